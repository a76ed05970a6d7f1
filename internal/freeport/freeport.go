// Package freeport finds ports for servers that tests start, stop, and start
// again at the same address.
package freeport

import (
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"testing"
)

// Ports that the kernel gives to outgoing connections (from 32768 on most
// systems) are no use: while a server is down, any connection of a busy machine
// may take its port.
const (
	first = 10_000
	last  = 32_000
)

var (
	mu    sync.Mutex
	given = make(map[int]bool)
)

// Get returns a port on which nobody listens, and which it has not returned
// before in this process.
func Get(t testing.TB) int {
	t.Helper()
	mu.Lock()
	defer mu.Unlock()
	for range 10_000 {
		port := first + rand.IntN(last-first)
		if !given[port] && free(port) {
			given[port] = true
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

// String is Get for those who want text.
func String(t testing.TB) string {
	t.Helper()
	return strconv.Itoa(Get(t))
}

func free(port int) bool {
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return false
	}
	return l.Close() == nil
}
