package picker

// odd spreads successive numbers over 64 bits: they have another product each, far from
// the others. It is 2^64 divided by the golden ratio.
const odd = 0x9e3779b97f4a7c15

// Hash returns a hash of s that is the same in every process and for ever:
// FNV-1a, whose bits are then mixed.
func Hash(s string) uint64 {
	h := uint64(0xcbf29ce484222325)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 0x100000001b3
	}
	return mix(h)
}

// mix is the finalizer of SplitMix64: every bit of x decides about every bit of
// the result.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
