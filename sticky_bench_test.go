package caddydiscovery

import (
	"fmt"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// BenchmarkSticky is what a lookup costs with sessions: the request of one that is kept,
// one without a cookie, one with a cookie that nobody has made, and the first one after
// a node has joined.
func BenchmarkSticky(b *testing.B) {
	for _, nodes := range []int{10, 10_000} {
		m := discoverytest.NewMemory()
		memories.Store(b.Name(), m)
		defer memories.Delete(b.Name())
		fill(b, m, nodes, nil)
		u := source(b, "registry memory "+b.Name()+"\nservice orders\nsticky {\nsecret a\nsecret b\n}")
		for _, kind := range []struct{ name, cookie string }{
			{"kept", u.Sticky.keyring.Token("orders-7")},
			{"none", ""},
			{"made-up", u.Sticky.keyring.Token("orders-7")[1:] + "A"},
			{"other", "0123456789"},
		} {
			b.Run(fmt.Sprintf("%s/nodes=%d", kind.name, nodes), func(b *testing.B) {
				r := request()
				if kind.cookie != "" {
					r.Header.Set("Cookie", "theme=dark; "+defaultStickyCookie+"="+kind.cookie)
				}
				b.ReportAllocs()
				for b.Loop() {
					upstreams, err := u.GetUpstreams(r)
					if err != nil || len(upstreams) != 1 {
						b.Fatalf("looked up %d upstreams: %v", len(upstreams), err)
					}
					a, _ := attemptsOf(r)
					a.current = a.current[:0]
				}
			})
		}
	}
}
