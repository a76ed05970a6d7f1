package caddydiscovery

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"
)

// wholeList returns all nodes of a source as upstreams, as if it knew no policies.
func wholeList(u *Upstreams) reverseproxy.UpstreamPool {
	var pool reverseproxy.UpstreamPool
	for _, e := range u.directory.Snapshot().Nodes() {
		pool = append(pool, &reverseproxy.Upstream{Dial: u.dial(e)})
	}
	host(pool)
	return pool
}

// TestHashingPoliciesChooseAsAmongAll has thousands of keys chosen for by Caddy's own
// policies, among what a source returns and among all nodes, through joins and leaves.
func TestHashingPoliciesChooseAsAmongAll(t *testing.T) {
	policies := map[string]map[string]any{
		"ip_hash": policy("ip_hash"), "client_ip_hash": policy("client_ip_hash"), "uri_hash": policy("uri_hash"),
		"query": policy("query", "key", "key"), "header": policy("header", "field", "X-Key"), "host": policy("header", "field", "Host"),
	}
	for what, load := range policies {
		t.Run(what, func(t *testing.T) {
			name, m := newMemory(t)
			for i := range 200 {
				// Of different lengths, and one address twice.
				list(t, m, fmt.Sprint("n", i), fmt.Sprintf("http://10.%d.%d.1:%d", i%200, i*i%256, 80+i*i))
			}
			list(t, m, "twin", "http://10.0.0.1:80")
			for i := range 20 {
				list(t, m, fmt.Sprint("six", i), fmt.Sprintf("http://[2001:db8:1111:2222:3333:4444:5555:%x]:8080", 4096+i))
			}
			u := source(t, "registry memory "+name, "load_balancing", load, "health_checks", passive)
			for change := range 6 {
				all := wholeList(u)
				for i := range 1000 {
					key := fmt.Sprintf("%d-%0*d", i, i%60, change)
					r := request()
					r.RemoteAddr = fmt.Sprintf("192.0.2.%d:%d", i%256, i)
					caddyhttp.SetVar(r.Context(), caddyhttp.ClientIPVarKey, fmt.Sprintf("2001:db8::%x", i))
					r.RequestURI = "/" + key
					r.URL.RawQuery = "key=a&key=" + key
					r.Header.Set("X-Key", key)
					r.Host = key
					want := u.wrapper.Selector.Select(all, r, nil).Dial
					if got := selected(t, u, r).Dial; got != want {
						t.Fatalf("key %q went to %s, and among all it goes to %s", key, got, want)
					}
				}
				before := u.directory.Snapshot()
				if change%2 == 0 {
					list(t, m, fmt.Sprint("new", change), fmt.Sprintf("http://10.250.0.%d:8080", change))
				} else {
					m.Expire(fmt.Sprint("n", change*31))
				}
				<-before.Superseded()
			}
		})
	}
}

// TestWhoStandsInForAKeyIsCaddysSecond has attempts fail: each goes where the policy
// would go without those that failed.
func TestWhoStandsInForAKeyIsCaddysSecond(t *testing.T) {
	for _, options := range []string{"", "\nsubset 8\nproxy_id p"} {
		u := source(t, "registry memory "+hundred(t)+options, "load_balancing",
			map[string]any{"retries": 3, "selection_policy": map[string]any{"policy": "uri_hash"}})
		for i := range 100 {
			r := request()
			r.RequestURI = fmt.Sprint("/", i)
			left := wholeList(u)
			if options != "" {
				left = nil
			}
			tried := make(map[string]bool)
			for range 3 {
				got := selected(t, u, r).Dial
				if left != nil {
					if want := u.wrapper.Selector.Select(left, r, nil).Dial; got != want {
						t.Fatalf("key %d went to %s, want %s", i, got, want)
					}
					for j, up := range left {
						if up.Dial == got {
							left = append(left[:j:j], left[j+1:]...)
							break
						}
					}
				}
				if tried[got] {
					t.Fatalf("key %d went to %s twice", i, got)
				}
				tried[got] = true
			}
		}
	}
}

// cookieSession lets a source choose for a request with a cookie, "" for none. It returns
// where it goes and the cookie from then on.
func cookieSession(t *testing.T, u *Upstreams, cookie string) (address, next string) {
	t.Helper()
	r := request()
	if cookie != "" {
		r.AddCookie(&http.Cookie{Name: "lb", Value: cookie})
	}
	pool, err := u.GetUpstreams(r)
	if err != nil {
		t.Fatal(err)
	}
	host(pool)
	w := httptest.NewRecorder()
	address = u.handler.LoadBalancing.SelectionPolicy.Select(pool, r, w).Dial
	if set := w.Result().Cookies(); len(set) > 0 {
		return address, set[0].Value
	}
	return address, cookie
}

func TestSessionsByCookieStayWhereTheyAre(t *testing.T) {
	name, m := newMemory(t)
	for i := range 50 {
		list(t, m, fmt.Sprint("n", i), fmt.Sprint("http://10.0.0.1:", 1000+i))
	}
	u := source(t, "registry memory "+name, "load_balancing", policy("cookie", "secret", "s", "fallback", map[string]any{"policy": "round_robin"}))
	at := make(map[string]string) // cookie → address
	for range 50 {
		address, cookie := cookieSession(t, u, "")
		at[cookie] = address
	}
	if len(at) != 50 {
		t.Fatalf("50 sessions in turn are on %d nodes, want each on another", len(at))
	}
	for range 2 {
		for cookie, want := range at {
			if got, next := cookieSession(t, u, cookie); got != want || next != cookie {
				t.Fatalf("a session went to %s, want %s where it was", got, want)
			}
		}
		before := u.directory.Snapshot()
		list(t, m, "new", "http://10.0.0.2:80")
		if before.Node("new") == nil {
			<-before.Superseded()
		}
	}
	before := u.directory.Snapshot()
	m.Expire("n7")
	<-before.Superseded()
	for cookie, was := range at {
		got, next := cookieSession(t, u, cookie)
		if moved := was == "10.0.0.1:1007"; moved != (got != was) || moved != (next != cookie) {
			t.Errorf("the session at %s went to %s, where one node left", was, got)
		}
	}
	if got, next := cookieSession(t, u, "made up"); got == "" || next == "made up" {
		t.Error("a cookie that stands for no node was kept")
	}
}

func TestFallbackOf(t *testing.T) {
	u := source(t, "registry memory "+hundred(t), "load_balancing", builtIn["query, choose 3"].load)
	got, ok := fallbackOf(u.handler.LoadBalancing.SelectionPolicy.(*policyWrapper).Selector).(*reverseproxy.RandomChoiceSelection)
	if !ok || got.Choose != 3 {
		t.Errorf("the fallback is %v, want random_choose 3: Caddy may keep it elsewhere now", got)
	}
	if got := fallbackOf(new(reverseproxy.IPHashSelection)); got != nil {
		t.Errorf("ip_hash falls back to %v, want nothing", got)
	}
}
