package redis

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"testing/iotest"
)

// answers is a connection that reads what a server said.
type answers struct {
	net.Conn
	io.Reader
}

func (a answers) Read(p []byte) (int, error) { return a.Reader.Read(p) }

func TestLongStringsAreCut(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", maxString+1)
	for name, c := range map[string]struct{ said, want string }{
		"short":     {"+OK\r\n$3\r\n$9\r\n\r\n", "+OK\r\n$3\r\n$9\r\n\r\n"},
		"nothing":   {"$-1\r\n*0\r\n$0\r\n\r\n_\r\n", "$-1\r\n*0\r\n$0\r\n\r\n_\r\n"},
		"fitting":   {fmt.Sprintf("$%d\r\n%s\r\n:1\r\n", maxString, long[1:]), fmt.Sprintf("$%d\r\n%s\r\n:1\r\n", maxString, long[1:])},
		"long":      {fmt.Sprintf("$%d\r\n%s\r\n:1\r\n", len(long), long), fmt.Sprintf("$%d\r\n%s\r\n:1\r\n", maxString, long[1:])},
		"in a list": {fmt.Sprintf("*2\r\n$%d\r\n%s\r\n$1\r\na\r\n", len(long), long), fmt.Sprintf("*2\r\n$%d\r\n%s\r\n$1\r\na\r\n", maxString, long[1:])},
		"verbatim":  {fmt.Sprintf("=%d\r\n%s\r\n", len(long), long), fmt.Sprintf("=%d\r\n%s\r\n", maxString, long[1:])},
		"long line": {"-" + long + "\r\n$1\r\na\r\n", "-" + long + "\r\n$1\r\na\r\n"},
		"garbage":   {"$1x\r\n$\r\n\n$\n=", "$1x\r\n$\r\n\n$\n"},
	} {
		for how, reader := range map[string]func(io.Reader) io.Reader{
			"whole":      func(r io.Reader) io.Reader { return r },
			"in halves":  iotest.HalfReader,
			"in bytes":   iotest.OneByteReader,
			"timing out": func(r io.Reader) io.Reader { return &interrupted{r: iotest.OneByteReader(r)} },
		} {
			t.Run(name+" "+how, func(t *testing.T) {
				t.Parallel()
				got, err := readAll(limit(answers{Reader: reader(strings.NewReader(c.said))}))
				if err != nil || got != c.want {
					t.Errorf("%d bytes, %v, want %d: %.40q", len(got), err, len(c.want), got)
				}
			})
		}
	}
}

// interrupted times out before each byte.
type interrupted struct {
	r     io.Reader
	ready bool
}

func (i *interrupted) Read(p []byte) (int, error) {
	if i.ready = !i.ready; i.ready {
		return 0, os.ErrDeadlineExceeded
	}
	return i.r.Read(p)
}

func readAll(c net.Conn) (string, error) {
	var all bytes.Buffer
	p := make([]byte, 1000)
	for {
		n, err := c.Read(p)
		all.Write(p[:n])
		switch {
		case errors.Is(err, io.EOF):
			return all.String(), nil
		case err != nil && !errors.Is(err, os.ErrDeadlineExceeded):
			return all.String(), err
		}
	}
}

// FuzzLimit: what is short enough comes through as it is, whatever it is.
func FuzzLimit(f *testing.F) {
	f.Add([]byte("+OK\r\n*2\r\n$3\r\nabc\r\n$-1\r\n"))
	f.Add([]byte("$999999999999999999999\r\n=1\r\n!2\r\nab\r\n%1\r\n"))
	f.Add([]byte("$5\r\nab"))
	f.Fuzz(func(t *testing.T, said []byte) {
		got, err := readAll(limit(answers{Reader: iotest.HalfReader(bytes.NewReader(said))}))
		if err != nil {
			t.Fatal(err)
		}
		// What ends in the middle of a line may be kept back, and what announces
		// a longer string than there may be is changed.
		if !bytes.HasPrefix(said, []byte(got)) && !bytes.Contains([]byte(got), fmt.Appendf(nil, "%d\r\n", maxString)) {
			t.Errorf("%q came through as %q", said, got)
		}
		if end := bytes.LastIndexByte(said, '\n') + 1; len(got) < end && strings.HasPrefix(string(said), got) {
			t.Errorf("of %q only %q came through", said, got)
		}
	})
}
