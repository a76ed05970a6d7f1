package picker

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cespare/xxhash/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// FuzzAddressHash holds the hash that is put together against that of the whole text.
func FuzzAddressHash(f *testing.F) {
	text := strings.Repeat("0123456789abcdefghijklmnopqrstuvwxyz", 8)
	for length := range blockBytes {
		for _, key := range []int{0, 1, 7, 8, 9, 13, 17, 23, 31, 32, 33, 63, 64, 100, 200} {
			f.Add(text[length:2*length], text[:key])
		}
	}
	f.Fuzz(func(t *testing.T, address, key string) {
		address = address[:min(len(address), blockBytes-1)] // longer ones are in no group
		g := addressGroup{length: len(address)}
		g.add(0, strings.Repeat("x", len(address)))
		g.add(1, address)
		var k keyHash
		ok := g.hashKey(key, &k)
		if ok == (len(address)%laneBytes+len(key) < laneBytes) {
			t.Fatalf("address %q, key %q: %v", address, key, ok)
		}
		if !ok {
			return
		}
		var room someHashes
		if got, want := k.hashes(&g, 1, &room)[0], xxhash.Sum64String(address+key); got != want {
			t.Errorf("address %q, key %q: %x, want %x", address, key, got, want)
		}
	})
}

func BenchmarkRanked(b *testing.B) {
	for _, nodes := range []int{100, 1_000, 10_000} {
		t := &tier{nodes: snapshotOf(b, plain(nodes)...).Nodes()}
		builder := newBuilder()
		for _, key := range []string{"192.0.2.17", "/a/path/of/usual/length?with=query", "/" + strings.Repeat("long/", 40)} {
			b.Run(fmt.Sprintf("nodes=%d/key=%d", nodes, len(key)), func(b *testing.B) {
				a := attempt{Choice: Choice{Key: key}, builder: builder}
				into := make([]*discovery.Entry, 0, 2)
				b.ReportAllocs()
				for b.Loop() {
					into = Ranked(1).pick(t, a, into[:0])
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*nodes), "ns/node")
			})
		}
	}
}
