package benchmarks

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// A counter is a proxy that counts the bytes that pass, both ways.
type counter struct {
	address string
	bytes   atomic.Int64
}

func newCounter(b *testing.B, server string) *counter {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	c := &counter{address: l.Addr().String()}
	var group sync.WaitGroup
	group.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer client.Close()
				upstream, err := net.Dial("tcp", server)
				if err != nil {
					return
				}
				defer upstream.Close()
				var both sync.WaitGroup
				pipe := func(to, from net.Conn) {
					_, _ = io.Copy(counting{to, &c.bytes}, from)
					_ = to.(*net.TCPConn).CloseWrite()
				}
				both.Go(func() { pipe(upstream, client) })
				both.Go(func() { pipe(client, upstream) })
				both.Wait()
			})
		}
	})
	b.Cleanup(func() {
		_ = l.Close()
		group.Wait()
	})
	return c
}

type counting struct {
	io.Writer
	bytes *atomic.Int64
}

func (c counting) Write(p []byte) (int, error) {
	c.bytes.Add(int64(len(p)))
	return c.Writer.Write(p)
}
