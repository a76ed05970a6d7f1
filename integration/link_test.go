package integration

import (
	"net"
	"sync"
	"testing"
	"time"
)

// A link is the network between Caddy and its registry, which can be slow, drop
// everything without a word, or be cut.
type link struct {
	listener net.Listener
	target   string
	group    sync.WaitGroup

	mu     sync.Mutex
	conns  map[net.Conn]bool
	delay  time.Duration
	silent chan struct{} // closed while bytes pass
	down   bool          // connections are refused as they come
}

func newLink(t *testing.T, target string) *link {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	k := &link{listener: l, target: target, conns: make(map[net.Conn]bool), silent: make(chan struct{})}
	close(k.silent)
	k.group.Go(k.accept)
	t.Cleanup(func() {
		_ = l.Close()
		k.drop(false)
		k.cut()
		k.group.Wait()
	})
	return k
}

func (k *link) address() string { return k.listener.Addr().String() }

func (k *link) port() int { return k.listener.Addr().(*net.TCPAddr).Port }

// slow makes every byte take that much longer, each way.
func (k *link) slow(d time.Duration) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.delay = d
}

// drop swallows everything, on connections old and new, and closes nothing.
func (k *link) drop(on bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	select {
	case <-k.silent:
		if on {
			k.silent = make(chan struct{})
		}
	default:
		if !on {
			close(k.silent)
		}
	}
}

// refuse closes new connections at once; cut closes those there are.
func (k *link) refuse(on bool) {
	k.mu.Lock()
	k.down = on
	k.mu.Unlock()
	if on {
		k.cut()
	}
}

func (k *link) cut() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for c := range k.conns {
		_ = c.(*net.TCPConn).SetLinger(0) // a reset, not a goodbye
		_ = c.Close()
	}
}

func (k *link) accept() {
	for {
		client, err := k.listener.Accept()
		if err != nil {
			return
		}
		k.mu.Lock()
		down := k.down
		k.mu.Unlock()
		if down {
			_ = client.Close()
			continue
		}
		server, err := net.Dial("tcp", k.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		k.mu.Lock()
		k.conns[client], k.conns[server] = true, true
		k.mu.Unlock()
		k.group.Go(func() { k.carry(server, client) })
		k.group.Go(func() { k.carry(client, server) })
	}
}

func (k *link) carry(to, from net.Conn) {
	defer func() {
		k.mu.Lock()
		delete(k.conns, from)
		k.mu.Unlock()
		_ = to.Close()
		_ = from.Close()
	}()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			k.mu.Lock()
			delay, silent := k.delay, k.silent
			k.mu.Unlock()
			time.Sleep(delay)
			<-silent
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
