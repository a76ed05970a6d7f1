package caddydiscovery

import (
	"net/http"
	"testing"
)

func TestHops(t *testing.T) {
	for _, test := range []struct {
		via  []string
		want int
	}{
		{nil, 0},
		{[]string{"1.1 Caddy"}, 1},
		{[]string{"1.1 Caddy", "2.0 Caddy", "3.0 Caddy"}, 3},
		{[]string{"1.1 Caddy, 2.0 Caddy,1.1 Caddy (edge)"}, 3},
		{[]string{"1.0 fred, 1.1 p.example.net", "HTTP/1.1 GWA", "1.1 Caddyshack", "1.1 caddy"}, 0},
		{[]string{"", ",,,", "Caddy", " Caddy"}, 0},
	} {
		if got := hops(http.Header{"Via": test.via}); got != test.want {
			t.Errorf("%q: %d hops, want %d", test.via, got, test.want)
		}
	}
}

func BenchmarkHops(b *testing.B) {
	header := http.Header{"Via": {"2.0 Caddy"}, "User-Agent": {"x"}}
	b.ReportAllocs()
	for b.Loop() {
		if hops(header) != 1 {
			b.Fatal("miscounted")
		}
	}
}
