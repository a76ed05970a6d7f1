package discoverytest

import (
	"net"
	"sync"
	"time"
)

// A distance is a way to a registry that takes time: each byte arrives half a
// round trip after it was sent, however many are under way.
type distance struct {
	listener net.Listener
	target   string
	oneWay   time.Duration
	group    sync.WaitGroup

	mu    sync.Mutex
	ended bool
	conns []net.Conn
}

// newDistance returns a way to the address. The caller closes it.
func newDistance(target string, roundTrip time.Duration) (*distance, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	d := &distance{listener: l, target: target, oneWay: roundTrip / 2}
	d.group.Go(d.accept)
	return d, nil
}

// address is where the way begins, as host:port.
func (d *distance) address() string { return d.listener.Addr().String() }

func (d *distance) close() {
	_ = d.listener.Close()
	d.mu.Lock()
	d.ended = true
	for _, c := range d.conns {
		_ = c.Close()
	}
	d.mu.Unlock()
	d.group.Wait()
}

func (d *distance) accept() {
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
		d.carry(server, client)
		d.carry(client, server)
	}
}

// carry brings what one side sends to the other, later.
func (d *distance) carry(to, from net.Conn) {
	type parcel struct {
		due  time.Time
		data []byte
	}
	way := make(chan parcel, 1024)
	d.group.Go(func() {
		defer close(way)
		for {
			buffer := make([]byte, 32<<10)
			n, err := from.Read(buffer)
			if n > 0 {
				way <- parcel{time.Now().Add(d.oneWay), buffer[:n]}
			}
			if err != nil {
				return
			}
		}
	})
	d.group.Go(func() {
		defer to.Close()
		defer from.Close()
		for p := range way {
			time.Sleep(time.Until(p.due))
			if _, err := to.Write(p.data); err != nil {
				_ = from.Close() // the reader ends
				for range way {  // and is not held up until then
				}
				return
			}
		}
	})
}
