package main

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"
)

// state is what the demo knows of a node, from the node itself or because it
// has killed it.
type state int

const (
	starting state = iota
	up
	draining
	left
	crashed
)

func (s state) String() string {
	return [...]string{"starting", "up", "draining", "left", "crashed"}[s]
}

// A node is one sample service.
type node struct {
	id    string
	cmd   *exec.Cmd
	stdin io.Closer
	ended chan struct{}

	mu         sync.Mutex
	state      state
	registered time.Time // zero until it is
	leftAt     time.Time // zero until it has
}

func (n *node) now() (s state, registered, leftAt time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state, n.registered, n.leftAt
}

func (n *node) become(s state) {
	n.mu.Lock()
	defer n.mu.Unlock()
	// What it said before it was killed may be read only afterwards.
	if n.state == crashed {
		return
	}
	n.state = s
	switch s {
	case up:
		n.registered = time.Now()
	case left:
		n.leftAt = time.Now()
	}
}

// await waits until the node is in this state.
func (n *node) await(ctx context.Context, want state) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err := until(ctx, func() bool {
		s, _, _ := n.now()
		select {
		case <-n.ended:
			return true
		default:
			return s >= want
		}
	})
	if s, _, _ := n.now(); s < want {
		return fmt.Errorf("%s is %s, not %s: %w", n.id, s, want, cmp.Or(err, io.ErrUnexpectedEOF))
	}
	return nil
}

// A fleet is all the nodes there were.
type fleet struct {
	registry string

	mu    sync.Mutex
	nodes []*node // in the order of their start
}

// add starts a node, with more flags of service.
func (f *fleet) add(id string, flags ...string) (*node, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	n := &node{id: id, ended: make(chan struct{})}
	n.cmd = exec.Command(self, append([]string{"service", "--id", id, "--registry", f.registry}, flags...)...)
	n.cmd.Stderr = os.Stderr
	if n.stdin, err = n.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := n.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := n.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", id, err)
	}
	go func() {
		defer close(n.ended)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			switch lines.Text() {
			case saysRegistered:
				n.become(up)
			case saysDraining:
				n.become(draining)
			case saysLeft:
				n.become(left)
			}
		}
		_ = n.cmd.Wait() // that it was killed is no news
	}()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nodes = append(f.nodes, n)
	return n, nil
}

// all returns the nodes, in the order of their start.
func (f *fleet) all() []*node {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*node(nil), f.nodes...)
}

// stop makes every node leave and waits until all processes have ended.
func (f *fleet) stop() {
	var wg sync.WaitGroup
	for _, n := range f.all() {
		wg.Go(func() { end(n.cmd.Process, n.ended, 4*time.Second) })
	}
	wg.Wait()
}
