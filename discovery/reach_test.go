package discovery

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
)

// The addresses of many nodes are tried a bounded number at once and each node's one
// after the other, and not those of nodes that are gone.
func TestReacherIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		now, most, tried := make(map[string]int), 0, make(map[string]int)
		r := newReacher(newDialer(Options{Probe: func(ctx context.Context, address string) error {
			mu.Lock()
			now[address]++
			tried[address]++
			most = max(most, now[address])
			mu.Unlock()
			<-ctx.Done()
			mu.Lock()
			defer mu.Unlock()
			now[address]--
			return ctx.Err()
		}}))
		want := func(i int) {
			e := entryAt(fmt.Sprint("n", i), "http://many.example:80")
			r.want(e.at([]netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i), 1}), netip.AddrFrom4([4]byte{10, 0, byte(i), 2})}))
		}
		for i := range 200 {
			want(i)
		}
		r.drop("n199")
		for again := true; r.busy(); again = false {
			if r.tryWaiting(t.Context()); r.running > maxReached {
				t.Errorf("the addresses of %d nodes are tried at once", r.running)
			}
			if again {
				for i := range 199 {
					want(i) // while those of some are being tried
				}
			}
			r.take(<-r.done, r.tried)
		}
		if most != 1 || len(tried) != 2*199 || tried["10.0.199.1:80"] != 0 {
			t.Errorf("tried are %d addresses, one of them %d times at once, one that is gone %d times", len(tried), most, tried["10.0.199.1:80"])
		}
		if tried["10.0.0.1:80"] > 2 {
			t.Errorf("what waits is tried %d times", tried["10.0.0.1:80"])
		}
	})
}
