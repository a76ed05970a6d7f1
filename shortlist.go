package caddydiscovery

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"reflect"
	"strings"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// A shortlist says which nodes a source returns for a request: those among which the
// handler's policy chooses as it would among all, because each one more costs Caddy a
// global lock.
type shortlist struct {
	strategy picker.Strategy
	// size is how many nodes there are at most; 0: any number.
	size int
	// shown is how many of them the policy is to choose among at first. The others are
	// for when it cannot take one of these. 0: all of them.
	shown int
	// weighs says that weights count, hence that a new node can start slowly.
	weighs bool
	// counts says that it goes by the requests in flight.
	counts bool

	// key returns the value by which the nodes of a request are found, false if it has
	// none. Nil: they are not found by a value. Token makes the value of an address of
	// it, where that is what it stands for.
	key   func(*http.Request) (string, bool)
	token func(address string) string
	// fallback is for requests without a value, and with one that stands for no node.
	fallback *shortlist
}

// choice returns how the nodes for a request are chosen.
func (s *shortlist) choice(r *http.Request) picker.Choice {
	for s.key != nil {
		key, ok := s.key(r)
		switch {
		case !ok:
			s = s.fallback
		case s.token != nil:
			other := s.fallback.choice(r)
			return picker.Choice{Strategy: s.strategy, Key: key, Else: &other}
		default:
			return picker.Choice{Strategy: s.strategy, Key: key}
		}
	}
	return picker.Choice{Strategy: s.strategy}
}

// shortlistFor returns the shortlist for a policy. With spare there is one node more than
// the policy needs, because Caddy may know of the first that it fails or is full before
// this source does: another request may have taken its last place meanwhile. Where other sources are beside this one, the policy chooses among what
// all of them return: see attempts.merge.
func shortlistFor(policy reverseproxy.Selector, spare bool) shortlist {
	more := 0
	if spare {
		more = 1
	}
	switch p := policy.(type) {
	case *reverseproxy.FirstSelection:
		return shortlist{strategy: picker.Leading(1 + more), size: 1 + more}
	case reverseproxy.RandomSelection, *reverseproxy.RandomSelection:
		return shortlist{strategy: picker.Draw(1 + more), size: 1 + more, shown: 1, weighs: true}
	case *reverseproxy.RandomChoiceSelection:
		return shortlist{strategy: picker.Draw(p.Choose), size: p.Choose, shown: p.Choose, weighs: true}
	case *reverseproxy.RoundRobinSelection:
		return shortlist{strategy: picker.Turns(1 + more), size: 1 + more, shown: 1, weighs: true}
	case *reverseproxy.LeastConnSelection:
		return shortlist{strategy: picker.LeastBusy(1 + more), size: 1 + more, shown: 1, weighs: true, counts: true}
	case *LeastLoad:
		return shortlist{strategy: picker.Shares(1 + more), size: 1 + more, shown: 1, weighs: true, counts: true}
	case *LeastLatency:
		return shortlist{strategy: picker.Soonest(1 + more), size: 1 + more, shown: 1, weighs: true, counts: true}
	}
	all := shortlist{strategy: picker.All{}}
	if s := hashedShortlist(policy); s.key != nil {
		s.size = 1 + more
		other := all
		if p := fallbackOf(policy); p != nil {
			other = shortlistFor(p, spare)
		}
		s.fallback, s.shown, s.counts = &other, other.shown, other.counts
		s.size = max(s.size, other.size)
		s.weighs = s.token != nil && other.weighs // new sessions are placed by the fallback
		if s.strategy == nil {
			s.strategy = picker.Ranked(1 + more)
		}
		return s
	}
	return all
}

// hashedShortlist returns what there is of a shortlist for a policy that hashes without
// regard to its fallback. Its values are those that Caddy's policies hash.
func hashedShortlist(policy reverseproxy.Selector) (s shortlist) {
	switch p := policy.(type) {
	case *reverseproxy.IPHashSelection:
		s.key = func(r *http.Request) (string, bool) { return withoutPort(r.RemoteAddr), true }
	case *reverseproxy.ClientIPHashSelection:
		s.key = func(r *http.Request) (string, bool) {
			address, _ := caddyhttp.GetVar(r.Context(), caddyhttp.ClientIPVarKey).(string)
			return withoutPort(address), true
		}
	case *reverseproxy.URIHashSelection:
		s.key = func(r *http.Request) (string, bool) { return r.RequestURI, true }
	case *reverseproxy.QueryHashSelection:
		s.key = func(r *http.Request) (string, bool) {
			values := strings.Join(r.URL.Query()[p.Key], ",")
			return values, values != ""
		}
	case *reverseproxy.HeaderHashSelection:
		s.key = func(r *http.Request) (string, bool) {
			if p.Field == "Host" && r.Host != "" {
				return r.Host, true
			}
			value := r.Header.Get(p.Field)
			return value, value != ""
		}
	case *reverseproxy.CookieHashSelection:
		s.strategy = picker.Session{}
		s.key = func(r *http.Request) (string, bool) {
			cookie, err := r.Cookie(p.Name)
			if err != nil {
				return "", false
			}
			return cookie.Value, true
		}
		s.token = func(address string) string {
			h := hmac.New(sha256.New, []byte(p.Secret))
			h.Write([]byte(address))
			return hex.EncodeToString(h.Sum(nil))
		}
	}
	return s
}

func withoutPort(address string) string {
	if host, _, err := net.SplitHostPort(address); err == nil {
		return host
	}
	return address
}

// fallbackOf returns a policy like the one that a hashing policy falls back to, with its
// options but for the fallback of its own; nil if it has none. Caddy keeps it in a field
// that is not exported, and has dropped the JSON of it.
func fallbackOf(policy reverseproxy.Selector) reverseproxy.Selector {
	v := reflect.Indirect(reflect.ValueOf(policy))
	if v.Kind() != reflect.Struct {
		return nil
	}
	field := v.FieldByName("fallback")
	if !field.IsValid() || field.Kind() != reflect.Interface || field.Elem().Kind() != reflect.Pointer {
		return nil
	}
	original := field.Elem().Elem()
	if original.Kind() != reflect.Struct {
		return nil
	}
	like := reflect.New(original.Type())
	for i := range original.NumField() {
		to := like.Elem().Field(i)
		switch from := original.Field(i); {
		case !to.CanSet():
		case from.CanInt():
			to.SetInt(from.Int())
		case from.Kind() == reflect.String:
			to.SetString(from.String())
		}
	}
	fallback, _ := like.Interface().(reverseproxy.Selector)
	return fallback
}

// shortlist returns the shortlist of what was configured.
func (p *Pick) shortlist() shortlist {
	s := shortlist{strategy: picker.Draw(p.Count), size: p.Count, weighs: true}
	if p.Hash != "" {
		s.strategy = picker.Owners(p.Count)
		s.key = func(r *http.Request) (string, bool) { return p.key(r), true }
	}
	return s
}

// checkSlowStart refuses what would have no effect.
func (s shortlist) checkSlowStart(policy reverseproxy.Selector) error {
	name := "this policy"
	if m, ok := policy.(caddy.Module); ok {
		name = "lb_policy " + m.CaddyModule().ID.Name()
	}
	if s.weighs {
		return nil
	}
	return fmt.Errorf("slow_start has no effect under %s, which knows no shares; want another policy, such as random, round_robin or least_conn", name)
}
