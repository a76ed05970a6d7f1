package discovery_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// TestWorstDays runs a fleet through random misfortune of its registry. Nodes
// that go on announcing themselves are in use throughout, and once all is well
// again the view equals the registry.
func TestWorstDays(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				random := rand.New(rand.NewPCG(seed, 2))
				m := discoverytest.NewMemory()
				conn := m.Open()
				var faithful []discovery.Node
				for i := range 5 {
					faithful = append(faithful, newNode(fmt.Sprint("faithful-", i)))
				}
				broken, silent := false, false
				m.Expiry = 20 * time.Second
				written := time.Now()
				// beat is what the faithful do every 10 seconds, if they can.
				beat := func() {
					if !broken && !silent {
						write(m, faithful...)
						written = time.Now()
					}
				}
				beat()
				d := follow(t, conn, discovery.Options{})
				next := time.Now()
				// When the registry is back it takes a registrar up to its longest
				// retry to notice, and after a wipe up to a heartbeat.
				soon := func() {
					if at := time.Now().Add(time.Duration(random.Int64N(int64(5 * time.Second)))); at.Before(next) {
						next = at
					}
				}
				for range 400 {
					fickle := newNode(fmt.Sprint("fickle-", random.IntN(8)))
					switch random.IntN(14) {
					case 0, 1, 2:
						if !broken && !silent {
							write(m, fickle)
						}
					case 3:
						if !broken && !silent {
							_ = conn.Withdraw(context.Background(), fickle)
						}
					case 4:
						if !broken && !silent {
							m.Expire(fickle.ID)
						}
					case 5:
						m.Drop(fickle.ID)
					case 6:
						if !broken && !silent {
							m.Put(fickle.ID, []byte("{"))
						}
					case 7:
						m.Break()
						broken = true
					case 8, 9:
						if time.Since(written) >= m.Expiry {
							for _, n := range faithful {
								m.Drop(n.ID)
							}
						}
						m.Restore()
						broken = false
						soon()
					case 10:
						m.Silence(true)
						silent = true
					case 11, 12:
						// Short silences may have met each of its attempts. One whose
						// lease the next could outlast is heard before it is judged.
						if silent && !broken && time.Since(written)+5*time.Second >= discovery.DefaultTTL {
							silent = false
							beat()
						}
						m.Silence(false)
						silent = false
						soon()
					case 13:
						m.Wipe()
					}
					for until := time.Now().Add(time.Duration(random.ExpFloat64() * float64(5*time.Second))); time.Now().Before(until); {
						time.Sleep(min(time.Until(until), max(time.Until(next), time.Millisecond)))
						if !time.Now().Before(next) {
							next = time.Now().Add(10 * time.Second)
							beat()
						}
						synctest.Wait()
						for _, n := range faithful {
							if d.Snapshot().Node(n.ID) == nil {
								t.Fatalf("%s announces itself and is not in use: [%s], broken %v, silent %v", n.ID, listed(d), broken, silent)
							}
						}
					}
				}
				m.Restore()
				m.Silence(false)
				for range 12 {
					write(m, faithful...)
					time.Sleep(10 * time.Second)
				}
				reconnect(t, d)
				expect(t, d, "faithful-0 faithful-1 faithful-2 faithful-3 faithful-4", "when all is well again")
			})
		})
	}
}
