package traffic

import (
	"bytes"
	"context"
	"errors"
	"io"
	"reflect"
)

// upload is the body of a request. It notes when it was read, and that reading it failed, which is nobody's
// fault at the other end: of a client that goes away while it sends, a transport returns
// the same errors as of a node, and the request's context does not end yet.
type upload Exchange

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.uploads.Read(p)
	switch {
	case err == nil:
	case err != io.EOF:
		if !u.closed.Load() {
			u.failed.Store(true)
		}
	case u.wholeAt.Load() == 0:
		now := Now()
		u.wholeAt.Store(int64(now))
		(*Exchange)(u).endUpload(now)
	}
	return n, err
}

// Close is called by a transport, whose reads fail from then on.
func (u *upload) Close() error {
	u.closed.Store(true)
	return u.uploads.Close()
}

var typeInMemory = reflect.TypeOf(io.NopCloser(bytes.NewReader(nil)))

// inMemory reports whether a body is one that Caddy has buffered. It cannot fail, and
// net/http knows its type and sends it together with the header.
func inMemory(body io.Reader) bool { return reflect.TypeOf(body) == typeInMemory }

// download is the body of a response. Its end is that of the exchange.
type download Exchange

func (d *download) Read(p []byte) (int, error) {
	n, err := d.downloads.Read(p)
	x := (*Exchange)(d)
	switch {
	case err == nil:
	case err == io.EOF:
		x.done(Answered, nil)
	case errors.Is(x.client.Err(), context.Canceled):
		x.done(Aborted, err)
	default:
		x.done(BrokeOff, err)
	}
	return n, err
}

// Close is called by Caddy for every response, after its end or instead.
func (d *download) Close() error {
	if x := (*Exchange)(d); !x.over.Load() {
		if err := x.client.Err(); errors.Is(err, context.Canceled) {
			x.done(Aborted, err)
		} else {
			x.done(Answered, nil)
		}
	}
	return d.downloads.Close()
}

// connection is the body of a response that upgrades the protocol.
type connection struct {
	io.ReadWriteCloser

	x *Exchange
}

// Close is called by Caddy when either side has ended.
func (c *connection) Close() error {
	c.x.done(Answered, nil)
	return c.ReadWriteCloser.Close()
}

// halfConnection is one of which the half can be closed in which we write.
type halfConnection struct {
	connection
	closeWriter
}

type closeWriter interface{ CloseWrite() error }

// upgrade returns a connection whose end is that of the exchange.
func (x *Exchange) upgrade(conn io.ReadWriteCloser) io.ReadWriteCloser {
	c := connection{conn, x}
	if half, ok := conn.(closeWriter); ok {
		return &halfConnection{c, half}
	}
	return &c
}
