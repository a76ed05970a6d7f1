package caddydiscovery

import (
	"cmp"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// Sticky keeps the requests of a client at one node, by a cookie. The cookie holds a
// keyed hash of the node's id, and no proxy remembers anything: all that have the same
// secrets know each other's cookies, over reloads and restarts, and a node keeps its
// sessions when its address changes. A session goes before prefer, subset, pick, weights
// and slow_start; which nodes the source uses at all still decides.
//
// Nodes that drain or have weight 0 keep the sessions that they have and get no new ones.
// From nodes that are gone, in maintenance or unhealthy they move to another one, with
// another cookie. A request that fails at its node, or that the node has no room for, goes
// elsewhere for this once.
type Sticky struct {
	// The name of the cookie. Sources whose requests may come from the same client, such
	// as those of two tiers of proxies, want different ones. Default: discovery_node
	Cookie string `json:"cookie,omitempty"`

	// What the cookies are made with: the first secret makes new ones, and those of all
	// are known, so that secrets can be rotated. Global placeholders are expanded, such as
	// {file./run/secrets/sticky} and {env.STICKY_SECRET}. Want 32 random bytes. Default:
	// none, and then everybody can make a cookie for a node whose id he guesses
	Secrets []string `json:"secrets,omitempty"`

	// How long a client keeps the cookie, counted from when it was set. Default: for as
	// long as its browser runs
	MaxAge caddy.Duration `json:"max_age,omitempty"`

	// What a request gets whose session cannot stay at its node: "repick" for another
	// node, or a status such as "503", which is said once and ends the session.
	// Default: repick
	Lost string `json:"lost,omitempty"`

	status  int // of Lost; 0: repick
	handler *reverseproxy.Handler
	keyring *picker.Keyring
	tokens  *sessionTokens // nil before it is provisioned
}

const (
	defaultStickyCookie = "discovery_node"
	// maxSecrets bounds the hashes that a cookie costs which nobody has made.
	maxSecrets = 8
	// maxStickyCookies is how many cookies of the name are looked at.
	maxStickyCookies = 4
)

// check completes what was configured, or refuses it.
func (s *Sticky) check() error {
	if s.Cookie == "" {
		s.Cookie = defaultStickyCookie
	}
	if (&http.Cookie{Name: s.Cookie}).Valid() != nil { //nolint:gosec // it is never sent
		return fmt.Errorf("cookie: invalid name %q, want letters, digits and any of !#$%%&'*+-.^_`|~", s.Cookie)
	}
	if s.MaxAge != 0 && time.Duration(s.MaxAge) < time.Second {
		return fmt.Errorf("max_age: invalid duration %v, want 1s or more", time.Duration(s.MaxAge))
	}
	var err error
	if s.status, err = parseLost(s.Lost); err != nil {
		return fmt.Errorf("lost: %w", err)
	}
	if len(s.Secrets) > maxSecrets {
		return fmt.Errorf("%d secrets, want %d at most", len(s.Secrets), maxSecrets)
	}
	return nil
}

// parseLost returns the status of an option lost, 0 for another node.
func parseLost(lost string) (int, error) {
	if lost == "" || lost == "repick" {
		return 0, nil
	}
	status, err := strconv.Atoi(lost)
	if err != nil || status < 400 || status > 599 {
		return 0, fmt.Errorf("invalid value %q, want repick or a status from 400 to 599", lost)
	}
	return status, nil
}

// attach has the handler keep sessions, and refuses one whose policy keeps requests at
// nodes by itself.
func (s *Sticky) attach(ctx caddy.Context, u *Upstreams, w *policyWrapper) error {
	if hashedShortlist(w.Selector).key != nil {
		return fmt.Errorf("sticky keeps a client at a node by a cookie, and lb_policy %s by something else; want a policy that places those without a session, "+
			"such as random, round_robin, least_conn or least_load, or no sticky", w.Selector.(caddy.Module).CaddyModule().ID.Name())
	}
	s.handler, w.sticky = u.handler, true
	return u.observe(ctx, s)
}

// A sessionTokens is what finds a directory's nodes by the tokens of the secrets, for all
// sources that have the same ones, as long as there is one.
type sessionTokens struct {
	*picker.Tokens

	key tokensKey
}

type tokensKey struct {
	registry backend.Key
	secrets  [sha256.Size]byte
}

// allTokens are those in use.
var allTokens = caddy.NewUsagePool() // tokensKey → *sessionTokens

// Destruct has nothing to let go of.
func (*sessionTokens) Destruct() error { return nil }

// provision reads the secrets, and acquires what is shared about the directory's nodes.
// It is matched by one of release.
func (s *Sticky) provision(d *sharedDirectory) error {
	hash := sha256.New()
	secrets := slices.Clone(s.Secrets) // what is configured stays as it is written
	for i := range secrets {
		if err := backend.ReplaceGlobals(&secrets[i]); err != nil {
			return fmt.Errorf("sticky: secret %d: %w", i+1, err)
		}
		if secrets[i] == "" {
			return fmt.Errorf("sticky: secret %d is empty, want some, such as 32 random bytes, or no line secret", i+1)
		}
		fmt.Fprintf(hash, "%d:%s", len(secrets[i]), secrets[i])
	}
	s.keyring = picker.NewKeyring(secrets...)
	key := tokensKey{registry: d.registry.key}
	hash.Sum(key.secrets[:0])
	var err error
	s.tokens, err = acquire(allTokens, key, func() (*sessionTokens, error) {
		return &sessionTokens{picker.NewTokens(s.keyring), key}, nil
	})
	return err
}

func (s *Sticky) release() {
	if s.tokens != nil {
		_, _ = allTokens.Delete(s.tokens.key)
	}
}

// A session is what the cookies of a request come to at one source.
type session struct {
	sticky *Sticky
	// node keeps the session; nil if there is none, or it cannot stay where it was.
	node *discovery.Entry
	// elsewhere says that the session stays where it is, and the request goes to another
	// node for this once.
	elsewhere bool
	// outdated says that the cookie is to be made anew, with the first secret.
	outdated bool
	// lost says that there was one, whose node does not keep it.
	lost bool
}

// keeps reports whether a node keeps the session.
func (s *session) keeps() bool { return s != nil && s.node != nil }

// stays reports whether the session stays where it is.
func (s *session) stays() bool { return s.keeps() || s.elsewhere }

// of returns what the cookies of a request come to. A node keeps its sessions as keeps
// says. Where there are several cookies of the name, as after one that was set for a path,
// a session that can stay goes before one that is lost.
func (s *Sticky) of(snapshot *discovery.Snapshot, header http.Header, keeps func(*discovery.Entry) bool) *session {
	is := &session{sticky: s}
	n := 0
	for value := range cookies(header, s.Cookie) {
		f := s.tokens.Find(snapshot, value)
		switch {
		case f.Node != nil && keeps(f.Node):
			s.see(f.Node)
			*is = session{sticky: s, node: f.Node, outdated: f.Outdated}
			return is
		case f.Lost && !snapshot.Synced:
			is.elsewhere = true // its node may be one of which nothing is known yet
		case f.Lost || f.Node != nil:
			is.lost = true
		}
		if n++; n == maxStickyCookies {
			break
		}
	}
	return is
}

// see notes that a session of the node was seen.
func (*Sticky) see(e *discovery.Entry) { peerOf(e).session.see() }

// cookies yields the values of the cookies of a name. [http.Request.CookiesNamed] takes
// three allocations for each.
func cookies(header http.Header, name string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, line := range header["Cookie"] {
			for line != "" {
				var pair string
				pair, line, _ = strings.Cut(line, ";")
				key, value, ok := strings.Cut(strings.TrimSpace(pair), "=")
				if !ok || key != name {
					continue
				}
				if len(value) > 1 && value[0] == '"' && value[len(value)-1] == '"' {
					value = value[1 : len(value)-1]
				}
				if !yield(value) {
					return
				}
			}
		}
	}
}

// What becomes of a session by a request, for the placeholder.
const (
	sessionKept  = "kept"
	sessionNew   = "new"
	sessionMoved = "moved"
)

// A placement is what a request does to its session if the attempt under way is answered.
type placement struct {
	state  string  // kept, new or moved; "" where the request goes to no source with sessions
	sticky *Sticky // whose cookie is set; nil: none
}

// place decides what becomes of the session of a request that goes to a node of a source
// with the session is; both are nil if it goes elsewhere. All are the sessions of all
// sources: while one of them stays where it is no other begins.
func place(is *session, node *discovery.Entry, all []*session) placement {
	state := sessionNew
	for _, s := range all {
		switch {
		case s.stays() && s == is && s.node == node && s.outdated:
			return placement{sessionKept, s.sticky}
		case s.stays():
			return placement{sessionKept, nil}
		case s.lost:
			state = sessionMoved
		}
	}
	if is == nil {
		return placement{}
	}
	return placement{state, is.sticky}
}

// refused returns whose status the request gets because its session is lost, nil if none.
func (w *watched) refused() (lost *Sticky) {
	for _, s := range w.sessions {
		switch {
		case s.stays():
			return nil
		case s.lost && s.sticky.status != 0:
			lost = cmp.Or(lost, s.sticky)
		}
	}
	return lost
}

// sessionUpstream returns the upstream whose node keeps the request's session, nil if there is none
// or Caddy would not send it a request now.
func (a *attempts) sessionUpstream() *reverseproxy.Upstream {
	for _, c := range a.current {
		if !c.session.keeps() {
			continue
		}
		if i := slices.Index(c.nodes, c.session.node); i >= 0 && c.upstreams[i].Available() {
			return c.upstreams[i]
		}
	}
	return nil
}

// session returns what the cookies of a request come to.
func (u *Upstreams) session(a *attempts, q *picker.Query) *session {
	if q == nil {
		q = &u.pickers.Query
	}
	snapshot := u.directory.Snapshot()
	is := u.Sticky.of(snapshot, a.watched.header, func(e *discovery.Entry) bool {
		return u.builder.Keeps(e, q) && u.serves(snapshot, a.request, e)
	})
	a.watched.sessions = append(a.watched.sessions, is)
	return is
}

// pickWithin is pick for a request whose session is at a node. That one is alone, unless
// Caddy may know by now that it fails or is full: then there are others beside it.
func (u *Upstreams) pickWithin(is *session, p *picker.Picker, r *http.Request, tried *picker.AddressSet, l *lookup) ([]*discovery.Entry, *picker.Race) {
	e := is.node
	can := u.builder.CanServe(e, tried)
	if can && u.builder.Unavailable == nil && e.Capacity() == 0 {
		return append(l.room(1), e), nil
	}
	nodes, race := u.pick(p, r, tried, l)
	if can && !slices.Contains(nodes, e) || len(nodes) == 0 {
		nodes = append(slices.Clip(nodes), e) // they may be the picker's
	}
	return nodes, race
}

// placed notes what becomes of the session if the attempt is answered that is about to be
// sent to a node of the source with the session is.
func (a *attempts) placed(is *session, node *discovery.Entry, rw http.ResponseWriter) {
	w := a.watched
	w.placement, w.response = place(is, node, w.sessions), rw
	if a.chosen != nil {
		a.chosen.session = w.placement.state
	}
}

// Sent implements traffic.Observer.
func (*Sticky) Sent(*traffic.Exchange) {}

// Done implements traffic.Observer.
func (*Sticky) Done(*traffic.Exchange) {}

// Answered sets the cookie: only now is it known that the node that it names serves, and
// that no other is tried.
func (s *Sticky) Answered(x *traffic.Exchange) {
	w := watchedIn(x.Context())
	if w == nil || w.placement.sticky != s {
		return
	}
	s.see(x.Node)
	header := w.response.Header()
	if mayDiscard(s.handler.LoadBalancing) {
		// With the response goes its cookie. Otherwise that is ours, as the one of Caddy's
		// cookie policy is, and not header_down's.
		header = x.Response.Header
	}
	s.setCookie(header, w, s.keyring.Token(x.Node.Node.ID), int(time.Duration(s.MaxAge).Seconds()))
}

// mayDiscard reports whether a handler may throw away a response and try again, by an
// expression about it.
func mayDiscard(lb *reverseproxy.LoadBalancing) bool {
	return lb != nil && slices.ContainsFunc(lb.RetryMatch, func(set caddyhttp.MatcherSet) bool {
		return slices.ContainsFunc(set, func(m any) bool { _, ok := m.(*caddyhttp.MatchExpression); return ok })
	})
}

// end takes back the cookie of a session.
func (s *Sticky) end(w *watched, header http.Header) {
	s.setCookie(header, w, "", -1)
}

// setCookie sets the cookie in a response, in place of one of the same name, which another
// handler has set for this request.
func (s *Sticky) setCookie(header http.Header, w *watched, value string, maxAge int) {
	header["Set-Cookie"] = slices.DeleteFunc(header["Set-Cookie"], func(line string) bool {
		return strings.HasPrefix(line, s.Cookie+"=")
	})
	c := http.Cookie{ //nolint:gosec // it is Secure where the client has come over TLS
		Name: s.Cookie, Value: value, MaxAge: maxAge,
		Path: "/", HttpOnly: true, SameSite: http.SameSiteLaxMode, Secure: byTLS(w.request.TLS, w.header),
	}
	header.Add("Set-Cookie", c.String())
}

// byTLS reports whether the client has come over TLS, to us or to a proxy that is trusted.
// The handler's copy of a request has the header from Caddy itself, which has overwritten
// what others say.
func byTLS(connection *tls.ConnectionState, header http.Header) bool {
	values := header["X-Forwarded-Proto"]
	return connection != nil || len(values) > 0 && values[len(values)-1] == "https"
}

// stickyOption is the option 'sticky [<cookie> [<secret>]]', or a block.
func stickyOption(to **Sticky) caddyblock.Option {
	return caddyblock.Option{Usage: "[<cookie> [<secret>]], or a block of options", Custom: func(d *caddyfile.Dispenser) error {
		s := new(Sticky)
		*to = s
		options := caddyblock.Options{
			"cookie":  caddyblock.Text("<name>", &s.Cookie),
			"secret":  secretOption(&s.Secrets),
			"max_age": caddyblock.Duration(&s.MaxAge),
			"lost": caddyblock.Value("repick|<status>", &s.Lost, func(arg string) (string, error) {
				_, err := parseLost(arg)
				return arg, err
			}),
		}
		args := d.RemainingArgs()
		for i, name := range []string{"cookie", "secret"}[:min(len(args), 2)] {
			if err := options[name].Set(args[i : i+1]); err != nil {
				return err
			}
		}
		if len(args) > 2 {
			return caddyblock.ErrUsage
		}
		if len(args) > 0 {
			delete(options, "cookie")
		}
		return caddyblock.Block{What: "sticky", Options: options, Check: caddyblock.Literals(s, (*Sticky).check, "cookie", "lost")}.Parse(d)
	}}
}

// secretOption adds a secret. No message of it tells what was given.
func secretOption(to *[]string) caddyblock.Option {
	return caddyblock.Option{Usage: "<secret>", Min: 1, Max: 1, Repeatable: true, Set: func(args []string) error {
		if args[0] == "" {
			return errors.New("the secret is empty, want one such as {file./run/secrets/sticky}")
		}
		*to = append(*to, args[0])
		return nil
	}}
}
