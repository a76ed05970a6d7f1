package health

import (
	"context"
	"net/http"
	"testing"
	"time"
)

func TestRequestOfACheck(t *testing.T) {
	for _, test := range []struct {
		what                string
		options             Options
		address, host       string
		wantURL, wantHost   string
		wantCheck, wantUser string
	}{
		{"an address", Options{URI: "/x?y=1"}, "10.0.0.1:80", "10.0.0.1:80", "http://10.0.0.1:80/x?y=1", "10.0.0.1:80", "", "caddy-discovery"},
		{"a name", Options{URI: "/"}, "10.0.0.1:80", "orders.example:80", "http://10.0.0.1:80/", "orders.example:80", "", "caddy-discovery"},
		{"a port of its own", Options{URI: "/", Port: 9000}, "10.0.0.1:9000", "orders.example:80", "http://10.0.0.1:9000/", "10.0.0.1:9000", "", "caddy-discovery"},
		{"TLS", Options{URI: "/", HTTPS: true}, "orders.example:443", "orders.example:443", "https://orders.example:443/", "orders.example:443", "", "caddy-discovery"},
		{"headers", Options{URI: "/", Headers: http.Header{"host": {"h.example"}, "x-check": {"yes"}, "user-agent": {"me"}}},
			"10.0.0.1:80", "10.0.0.1:80", "http://10.0.0.1:80/", "h.example", "yes", "me"},
	} {
		req, err := test.options.Request(context.Background(), test.address, test.host)
		if err != nil {
			t.Errorf("%s: %v", test.what, err)
			continue
		}
		if req.URL.String() != test.wantURL || req.Host != test.wantHost || req.Header.Get("X-Check") != test.wantCheck || req.Header.Get("User-Agent") != test.wantUser {
			t.Errorf("%s: %s of host %q with %v", test.what, req.URL, req.Host, req.Header)
		}
	}
}

func TestStatusThatPasses(t *testing.T) {
	for _, test := range []struct {
		want   string
		status int
		ok     bool
	}{
		{"2xx", 200, true}, {"2xx", 299, true}, {"2xx", 301, false}, {"2xx", 500, false},
		{"204", 204, true}, {"204", 200, false}, {"3xx", 302, true},
	} {
		o := Options{Status: test.want}
		if ok := o.accepts(test.status); ok != test.ok {
			t.Errorf("%d passes for %s: %v", test.status, test.want, ok)
		}
	}
	for s, ok := range map[string]bool{
		"200": true, "2xx": true, "5xx": true, "599": true, "": false, "20": false, "2000": false, "2x": false, "6xx": false, "xx2": false, "ok": false, "-20": false,
	} {
		if err := CheckStatus(s); (err == nil) != ok {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestChecksOfConnections(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		f.list("a1", 1)
		f.list("b1", 0)
		c := f.checker(Options{TCP: true})
		f.expect(c, "a1", Healthy, "it accepts connections")
		f.expect(c, "b1", Unhealthy, "it refuses them")
		if f.last != nil {
			t.Error("a node was asked something")
		}
	})
}

func TestChecksOfAnotherPort(t *testing.T) {
	inBubble(t, func(t *testing.T, f *fleet) {
		f.list("a1", 500)
		f.answers["10.97.0.2:9000"] = 200
		c := f.checker(Options{Port: 9000})
		f.expect(c, "a1", Healthy, "checked at the other port")
		if s, _ := c.Of(f.directory.Snapshot().Node("a1")); !s.Serves() {
			t.Error("it does not serve")
		}
		time.Sleep(time.Second)
	})
}
