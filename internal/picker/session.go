package picker

import (
	"slices"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Session has the node whose token is the key, and where there is none that can serve
// the nodes of the choice Else.
type Session struct{}

func (Session) pick(t *tier, a attempt, into []*discovery.Entry) []*discovery.Entry {
	e := t.sessions(a.builder).nodes[a.Key]
	if e != nil && (!a.selective() || a.canServe(e)) && (len(t.reserve) == 0 || slices.Contains(t.all(&a), e)) {
		if a.race != nil {
			a.race.Kept = true
		}
		return append(into, e)
	}
	a.Choice = *a.Else
	return a.Strategy.pick(t, a, into)
}
func (Session) prepare(t *tier, b *Builder) { t.sessions(b) }
func (Session) size(t *tier) int            { return (len(t.nodes) + len(t.reserve)) * sessionBytes }

// sessionBytes is about what a node takes in sessions with a token of 64 bytes.
const sessionBytes = 200

// sessions finds nodes by their tokens.
type sessions struct {
	tokens map[string]string // by address
	nodes  map[string]*discovery.Entry
}

func (t *tier) sessions(b *Builder) *sessions {
	t.sessionOnce.Do(func() {
		t.session.Store(newSessions(slices.Concat(t.nodes, t.reserve), t.session.Load(), b))
	})
	return t.session.Load()
}

// newSessions takes over what tokens there were earlier, because one costs more than all
// else about it.
func newSessions(nodes []*discovery.Entry, earlier *sessions, b *Builder) *sessions {
	s := &sessions{tokens: make(map[string]string, len(nodes)), nodes: make(map[string]*discovery.Entry, len(nodes))}
	for _, e := range nodes {
		address := e.DialAddress(b.TLS)
		token := ""
		if earlier != nil {
			token = earlier.tokens[address]
		}
		if token == "" {
			token = b.Token(address)
		}
		s.tokens[address] = token
		if s.nodes[token] == nil { // the first of two with one address, as Caddy's policies
			s.nodes[token] = e
		}
	}
	return s
}
