package discovery_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// network is where probes go in tests: addresses accept connections or refuse
// them.
type network struct {
	mu     sync.Mutex
	up     map[string]bool
	err    error         // what a refusal says; default: refused
	delay  time.Duration // of every answer
	dials  map[string]int
	now    int // dials under way
	most   int
	answer func(address string) // called before an answer, where given
}

func newNetwork(nodes ...discovery.Node) *network {
	n := &network{up: make(map[string]bool), dials: make(map[string]int)}
	n.set(true, nodes...)
	return n
}

func (n *network) set(up bool, nodes ...discovery.Node) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, node := range nodes {
		n.up[node.Endpoint.Address()] = up
	}
}

// count returns how often a node was dialled.
func (n *network) count(node discovery.Node) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dials[node.Endpoint.Address()]
}

func (n *network) total() (total int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, times := range n.dials {
		total += times
	}
	return total
}

func (n *network) probe(ctx context.Context, address string) error {
	n.mu.Lock()
	n.dials[address]++
	n.now++
	n.most = max(n.most, n.now)
	up, delay, err, answer := n.up[address], n.delay, n.err, n.answer
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.now--
	}()
	if delay > 0 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(delay):
		}
	}
	if answer != nil {
		answer(address)
	}
	switch {
	case up:
		return nil
	case err != nil:
		return err
	default:
		return fmt.Errorf("dialling %s: %w", address, syscall.ECONNREFUSED)
	}
}

// fleet returns nodes n0, n1, … with an address each.
func fleet(size int, pairs ...string) []discovery.Node {
	nodes := make([]discovery.Node, size)
	for i := range nodes {
		nodes[i] = newNode(fmt.Sprintf("n%d", i), pairs...)
		var err error
		if nodes[i].Endpoint, err = discovery.ParseEndpoint(fmt.Sprintf("http://10.1.%d.%d:5001", i/250, i%250)); err != nil {
			panic(err)
		}
	}
	return nodes
}

// states returns the nodes in use, each with its state unless it is up.
func states(d *discovery.Directory) string {
	var words []string
	for _, e := range d.Snapshot().Nodes() {
		word := e.Node.ID
		if e.State() != discovery.StateUp {
			word += ":" + string(e.State())
		}
		words = append(words, word)
	}
	return strings.Join(words, " ")
}

// inState returns how many nodes are in a state.
func inState(d *discovery.Directory, state discovery.State) (n int) {
	for _, e := range d.Snapshot().Nodes() {
		if e.State() == state {
			n++
		}
	}
	return n
}

func expectStates(t *testing.T, d *discovery.Directory, want, when string) {
	t.Helper()
	synctest.Wait()
	if got := states(d); got != want {
		t.Fatalf("%s: nodes [%s], want [%s]", when, got, want)
	}
}

// coalesced is longer than any change waits to be published.
const coalesced = 200 * time.Millisecond
