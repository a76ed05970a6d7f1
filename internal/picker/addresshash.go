package picker

import (
	"encoding/binary"
	"math/bits"
)

// What ranks the addresses of a fleet for a key is xxhash64 of the address and the key,
// one behind the other. Most of that is the same for all addresses of one length, and
// much of the rest for all keys: so it is taken apart here, which is several times
// as quick as to hash each of thousands of such texts. The algorithm, which reads eight
// bytes at a time, a lane, is described at
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.
const (
	prime1 = 11400714785074694791
	prime2 = 14029467366897019727
	prime3 = 1609587929392839161
	prime4 = 9650029242287828579
	prime5 = 2870177450012600261
)

const (
	laneBytes  = 8
	blockLanes = 4
	blockBytes = blockLanes * laneBytes
)

// An addressGroup has addresses of one length, which is less than a block.
type addressGroup struct {
	length int
	nodes  []uint32 // which nodes' they are, in their order
	// What an address has by lanes, one beside the other: those that it fills times
	// prime2, and what a round makes of that alone; and what is left in the low bytes of
	// the next.
	lanes  [blockLanes - 1][]uint64
	rounds [blockLanes - 1][]uint64
	left   []uint64
}

func (g *addressGroup) add(node int, address string) {
	g.nodes = append(g.nodes, uint32(node))
	var room [blockBytes]byte
	copy(room[:], address)
	full := len(address) / laneBytes
	for i := range full {
		lane := binary.LittleEndian.Uint64(room[i*laneBytes:]) * prime2
		g.lanes[i], g.rounds[i] = append(g.lanes[i], lane), append(g.rounds[i], round(0, lane))
	}
	g.left = append(g.left, binary.LittleEndian.Uint64(room[full*laneBytes:]))
}

// A keyHash is what the addresses of one group have in common for a key.
type keyHash struct {
	full  int    // lanes that an address fills
	total int    // bytes
	head  uint64 // what the key has of the lane that it shares with the address
	// Whole blocks, where there are any: what the lanes begin with, or come to where they
	// are all of the key, and the blocks after the first.
	blocks bool
	lanes  [blockLanes]uint64
	later  string
	// What is behind the blocks, or without blocks behind the shared lane.
	behind      [blockLanes - 1]uint64
	lanesBehind int
	half        uint64
	hasHalf     bool
	rest        [3]uint64
	bytesBehind int
}

// hashKey fills in that of a key; false if the key does not fill the lane that it shares.
func (g *addressGroup) hashKey(key string, k *keyHash) (ok bool) {
	shared := g.length % laneBytes
	if len(key) < laneBytes-shared {
		return false
	}
	*k = keyHash{}
	k.full, k.total = g.length/laneBytes, g.length+len(key)
	for i := range laneBytes - shared {
		k.head |= uint64(key[i]) << (8 * (shared + i))
	}
	key = key[laneBytes-shared:]
	next := func() (lane uint64) {
		lane, key = lane64(key), key[laneBytes:]
		return lane
	}
	if k.blocks = k.total >= blockBytes; k.blocks {
		k.lanes = blockStart
		for i := k.full + 1; i < blockLanes; i++ {
			k.lanes[i] = round(k.lanes[i], next()*prime2)
		}
		k.later = key[:len(key)/blockBytes*blockBytes]
		for i := k.full + 1; i < blockLanes; i++ {
			for at := i * laneBytes; at < len(k.later); at += blockBytes {
				k.lanes[i] = round(k.lanes[i], lane64(k.later[at:])*prime2)
			}
		}
		key = key[len(k.later):]
	}
	for len(key) >= laneBytes {
		k.behind[k.lanesBehind] = round(0, next()*prime2)
		k.lanesBehind++
	}
	if k.hasHalf = len(key) >= 4; k.hasHalf {
		k.half = uint64(key[0]) | uint64(key[1])<<8 | uint64(key[2])<<16 | uint64(key[3])<<24
		k.half *= prime1
		key = key[4:]
	}
	for i := range len(key) {
		k.rest[i] = uint64(key[i]) * prime5
	}
	k.bytesBehind = len(key)
	return true
}

func lane64(s string) uint64 {
	_ = s[7]
	return uint64(s[0]) | uint64(s[1])<<8 | uint64(s[2])<<16 | uint64(s[3])<<24 |
		uint64(s[4])<<32 | uint64(s[5])<<40 | uint64(s[6])<<48 | uint64(s[7])<<56
}

// blockStart is what the four lanes begin with, by the algorithm with the seed 0.
var blockStart = func() [blockLanes]uint64 {
	p1, p2 := uint64(prime1), uint64(prime2)
	return [blockLanes]uint64{p1 + p2, p2, 0, -p1}
}()

// round takes a lane, times prime2, into what was there before.
func round(before, lane uint64) uint64 { return bits.RotateLeft64(before+lane, 31) * prime1 }

// someHashes has those of some addresses.
type someHashes [64]uint64

// hashes returns those of some addresses of the group, from one on, in the room for them.
// Each step is done for all of them before the next, so that the processor has several to
// do at a time.
func (k *keyHash) hashes(g *addressGroup, from int, room *someHashes) []uint64 {
	left := g.left[from:min(from+len(room), len(g.left))]
	h := room[:len(left)]
	if k.blocks {
		k.hashBlocks(g, from, left, h)
	} else {
		k.hashLanes(g, from, left, h)
	}
	for _, lane := range k.behind[:k.lanesBehind] {
		for i, x := range h {
			h[i] = bits.RotateLeft64(x^lane, 27)*prime1 + prime4
		}
	}
	if half := k.half; k.hasHalf {
		for i, x := range h {
			h[i] = bits.RotateLeft64(x^half, 23)*prime2 + prime3
		}
	}
	// In pairs, because two steps in one go are quicker.
	rest := k.rest[:k.bytesBehind]
	if len(rest) >= 2 {
		first, second := rest[0], rest[1]
		for i, x := range h {
			x = bits.RotateLeft64(x^first, 11) * prime1
			h[i] = bits.RotateLeft64(x^second, 11) * prime1
		}
		rest = rest[2:]
	}
	if len(rest) == 1 {
		last := rest[0]
		for i, x := range h {
			h[i] = bits.RotateLeft64(x^last, 11) * prime1
		}
	}
	for i, x := range h {
		x = (x ^ x>>33) * prime2
		x = (x ^ x>>29) * prime3
		h[i] = x ^ x>>32
	}
	return h
}

// hashLanes puts into h what there is after the lanes of the address and the shared one,
// where there are no blocks.
func (k *keyHash) hashLanes(g *addressGroup, from int, left, h []uint64) {
	begin, head := prime5+uint64(k.total), k.head
	switch k.full { // as most addresses have it
	case 1:
		rounds := g.rounds[0][from:][:len(h)]
		for i, left := range left {
			x := bits.RotateLeft64(begin^rounds[i], 27)*prime1 + prime4
			h[i] = bits.RotateLeft64(x^round(0, (left|head)*prime2), 27)*prime1 + prime4
		}
	case 2:
		first, second := g.rounds[0][from:][:len(h)], g.rounds[1][from:][:len(h)]
		for i, left := range left {
			x := bits.RotateLeft64(begin^first[i], 27)*prime1 + prime4
			x = bits.RotateLeft64(x^second[i], 27)*prime1 + prime4
			h[i] = bits.RotateLeft64(x^round(0, (left|head)*prime2), 27)*prime1 + prime4
		}
	default:
		for i, left := range left {
			x := begin
			for _, rounds := range g.rounds[:k.full] {
				x = bits.RotateLeft64(x^rounds[from+i], 27)*prime1 + prime4
			}
			h[i] = bits.RotateLeft64(x^round(0, (left|head)*prime2), 27)*prime1 + prime4
		}
	}
}

// hashBlocks puts into h what there is after the blocks.
func (k *keyHash) hashBlocks(g *addressGroup, from int, left, h []uint64) {
	var lanes [blockLanes]someHashes
	same, head := uint64(0), k.head // same: of all addresses
	clear(h)
	for j := range blockLanes {
		if j > k.full {
			same += bits.RotateLeft64(k.lanes[j], laneTurns[j])
			continue
		}
		v, begin := lanes[j][:len(h)], k.lanes[j]
		if j == k.full {
			for i, left := range left {
				v[i] = round(begin, (left|head)*prime2)
			}
		} else {
			for i, lane := range g.lanes[j][from:][:len(h)] {
				v[i] = round(begin, lane)
			}
		}
		for at := j * laneBytes; at < len(k.later); at += blockBytes {
			lane := lane64(k.later[at:]) * prime2
			for i, x := range v {
				v[i] = round(x, lane)
			}
		}
		turn := laneTurns[j]
		for i, x := range v {
			h[i] += bits.RotateLeft64(x, turn)
		}
	}
	for i := range h {
		h[i] += same
	}
	for j := range blockLanes {
		if j > k.full {
			lane := round(0, k.lanes[j]*prime2)
			for i := range h {
				h[i] = (h[i]^lane)*prime1 + prime4
			}
			continue
		}
		for i, lane := range lanes[j][:len(h)] {
			h[i] = (h[i]^round(0, lane*prime2))*prime1 + prime4
		}
	}
	total := uint64(k.total)
	for i := range h {
		h[i] += total
	}
}

// laneTurns is by how much each lane is rotated before they are added.
var laneTurns = [blockLanes]int{1, 7, 12, 18}
