package picker

import (
	"sync"
	"sync/atomic"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Tokens finds the nodes of a directory by the tokens of a keyring. It follows the
// snapshots that it is shown, at the cost of a look at each node and of the hashes of
// those that have joined, and may be used by many goroutines.
type Tokens struct {
	keyring *Keyring
	holders sync.Map                           // token → holder
	newest  atomic.Pointer[discovery.Snapshot] // that was taken up

	mu   sync.Mutex  // held while a snapshot is taken up
	kept []*keptNode // of the newest snapshot, in its order; guarded by mu
}

// A keptNode is a node, whichever entry is its newest.
type keptNode struct {
	entry  atomic.Pointer[discovery.Entry]
	tokens []string // by each secret
}

// A holder is whose token one is, and which of the secrets made it.
type holder struct {
	node   *keptNode
	secret int
}

// NewTokens returns the tokens of a keyring, still of no node.
func NewTokens(k *Keyring) *Tokens { return &Tokens{keyring: k} }

// A Finding is what there is to a token.
type Finding struct {
	// Node is the one whose token it is; nil if there is none.
	Node *discovery.Entry
	// Outdated says that another secret than the first has made the token.
	Outdated bool
	// Lost says that it is a token of a node that the snapshot does not have.
	Lost bool
}

// Token returns the token of a node.
func (t *Tokens) Token(id string) string { return t.keyring.Token(id) }

// Find returns what there is to a token in a snapshot. Neither what clients make up nor
// how many tokens there are makes it cost more than some hashes.
func (t *Tokens) Find(s *discovery.Snapshot, token string) Finding {
	if len(token) != TokenLength {
		return Finding{}
	}
	if last := t.newest.Load(); last != s && t.mu.TryLock() {
		// Those that come meanwhile find what was there before, as they do in pickers.
		t.take(s)
		t.mu.Unlock()
	}
	if f := t.find(token); f.Node != nil {
		return f
	}
	if !t.keyring.Authentic(token) {
		return Finding{}
	}
	// Its node may just have joined.
	t.mu.Lock()
	t.take(s)
	t.mu.Unlock()
	if f := t.find(token); f.Node != nil {
		return f
	}
	return Finding{Lost: true}
}

func (t *Tokens) find(token string) Finding {
	v, ok := t.holders.Load(token)
	if !ok {
		return Finding{}
	}
	h := v.(*holder)
	return Finding{Node: h.node.entry.Load(), Outdated: h.secret > 0}
}

// take takes up a snapshot, unless a newer one was. The caller holds mu.
func (t *Tokens) take(s *discovery.Snapshot) {
	if last := t.newest.Load(); last != nil && last.Number >= s.Number {
		return
	}
	kept := make([]*keptNode, 0, len(s.Nodes()))
	old := t.kept
	for _, e := range s.Nodes() {
		for len(old) > 0 && old[0].id() < e.Node.ID {
			t.forget(old[0])
			old = old[1:]
		}
		if len(old) == 0 || old[0].id() != e.Node.ID {
			kept = append(kept, t.remember(e))
			continue
		}
		if old[0].entry.Load() != e {
			old[0].entry.Store(e)
		}
		kept = append(kept, old[0])
		old = old[1:]
	}
	for _, n := range old {
		t.forget(n)
	}
	t.kept = kept
	t.newest.Store(s)
}

func (n *keptNode) id() string { return n.entry.Load().Node.ID }

func (t *Tokens) remember(e *discovery.Entry) *keptNode {
	n := new(keptNode)
	n.entry.Store(e)
	for i := range t.keyring.macs {
		token := t.keyring.token(i, e.Node.ID)
		n.tokens = append(n.tokens, token)
		t.holders.LoadOrStore(token, &holder{n, i}) // of two equal secrets the first counts
	}
	return n
}

func (t *Tokens) forget(n *keptNode) {
	for _, token := range n.tokens {
		t.holders.Delete(token)
	}
}
