package redis

import (
	"bufio"
	"errors"
	"net"
	"strconv"
	"syscall"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// maxString is how much of one string of an answer is handed to the client
	// library, which keeps room for as much as the server announces: of a longer
	// one only so much comes through. No record may be as long.
	maxString = 2 * discovery.MaxRecord
	// maxLine bounds what stands outside of such strings: a status, an error.
	maxLine = 1 << 10
)

// A limitedConn is a connection to a server that hands on no string longer than
// maxString: the rest of it is thrown away as it comes. Most of what is too long is
// left out by the server (see look.lua); this is for what it cannot leave out, such
// as the entries of a stream and what is published.
type limitedConn struct {
	net.Conn
	in         *bufio.Reader
	line       []byte // what has come of a line
	out        []byte // what of a line is still to be handed on
	inside     bool   // of a line that was too long to be kept
	keep, drop int    // of a string
}

// limit wraps a connection. What the client library's pool looks through, to see
// whether an idle connection was closed, can still be looked through.
func limit(conn net.Conn) net.Conn {
	limited := &limitedConn{Conn: conn, in: bufio.NewReaderSize(conn, 16<<10)}
	if raw, ok := conn.(syscall.Conn); ok {
		return struct {
			*limitedConn
			syscall.Conn
		}{limited, raw}
	}
	return limited
}

// NetConn returns what the connection wraps, as a TLS connection does: the client
// library looks there for what a server says unasked, such as that it refuses the
// client's certificate.
func (c *limitedConn) NetConn() net.Conn { return c.Conn }

// Read fills p with as much as has come, and waits only if nothing has.
func (c *limitedConn) Read(p []byte) (n int, err error) {
	for n < len(p) && err == nil && (n == 0 || len(c.out) > 0 || c.in.Buffered() > 0) {
		var m int
		switch {
		case len(c.out) > 0:
			m = copy(p[n:], c.out)
			c.out = c.out[m:]
		case c.keep > 0:
			m, err = c.in.Read(p[n:min(len(p), n+c.keep)])
			c.keep -= m
		case c.drop > 0:
			var dropped int
			dropped, err = c.in.Discard(min(c.drop, 1<<20))
			c.drop -= dropped
		default:
			err = c.next()
		}
		n += m
	}
	if n > 0 {
		// The error comes again with the next call.
		return n, nil
	}
	return 0, err
}

// next reads more of a line. What has come of it stays there if the rest is not to
// be had yet.
func (c *limitedConn) next() error {
	part, err := c.in.ReadSlice('\n')
	c.line = append(c.line, part...)
	switch {
	case err == nil && c.inside:
		c.inside = false
		c.out = c.line
	case err == nil:
		c.out = c.header(c.line)
	case errors.Is(err, bufio.ErrBufferFull), len(c.line) > maxLine:
		// This is no header. An error of the connection comes again.
		c.inside, c.out, err = true, c.line, nil
	default:
		return err
	}
	c.line = c.line[:0] // out is handed on before this is written again
	return err
}

// header returns the line as it is to be handed on, and notes the string that it
// announces, if it does.
func (c *limitedConn) header(line []byte) []byte {
	if line[0] != '$' && line[0] != '=' && line[0] != '!' {
		return line
	}
	n, err := strconv.Atoi(string(line[1:max(len(line)-2, 1)]))
	if err != nil || n < 0 {
		return line // nothing, or something that the client library will refuse
	}
	if n <= maxString {
		c.keep = n
		return line
	}
	c.keep, c.drop = maxString, n-maxString
	return append(strconv.AppendInt(line[:1:1], maxString, 10), '\r', '\n')
}
