package discoverytest

import (
	"net"
	"sync"
	"time"
)

// A delayProxy is a way to a registry that takes time: each byte arrives half a
// round trip after it was sent, however many are under way.
type delayProxy struct {
	listener net.Listener
	target   string
	oneWay   time.Duration
	group    sync.WaitGroup

	mu    sync.Mutex
	ended bool
	conns []net.Conn
}

// newDelayProxy returns a proxy of the address. The caller closes it.
func newDelayProxy(target string, roundTrip time.Duration) (*delayProxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	d := &delayProxy{listener: l, target: target, oneWay: roundTrip / 2}
	d.group.Go(d.accept)
	return d, nil
}

// address is where the proxy listens, as host:port.
func (d *delayProxy) address() string { return d.listener.Addr().String() }

func (d *delayProxy) close() {
	_ = d.listener.Close()
	d.mu.Lock()
	d.ended = true
	for _, c := range d.conns {
		_ = c.Close()
	}
	d.mu.Unlock()
	d.group.Wait()
}

func (d *delayProxy) accept() {
	for {
		client, err := d.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", d.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		d.mu.Lock()
		d.conns = append(d.conns, client, server)
		if d.ended {
			_, _ = client.Close(), server.Close()
		}
		d.mu.Unlock()
		d.forward(server, client)
		d.forward(client, server)
	}
}

// forward brings what one side sends to the other, later.
func (d *delayProxy) forward(to, from net.Conn) {
	type chunk struct {
		due  time.Time
		data []byte
	}
	queue := make(chan chunk, 1024)
	d.group.Go(func() {
		defer close(queue)
		for {
			buffer := make([]byte, 32<<10)
			n, err := from.Read(buffer)
			if n > 0 {
				queue <- chunk{time.Now().Add(d.oneWay), buffer[:n]}
			}
			if err != nil {
				return
			}
		}
	})
	d.group.Go(func() {
		defer to.Close()
		defer from.Close()
		for p := range queue {
			time.Sleep(time.Until(p.due))
			if _, err := to.Write(p.data); err != nil {
				_ = from.Close()  // the reader ends
				for range queue { // and is not held up until then
				}
				return
			}
		}
	})
}
