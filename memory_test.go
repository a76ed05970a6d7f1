package caddydiscovery

import (
	"fmt"
	"log/slog"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func init() { caddy.RegisterModule(memoryBackend{}) }

// memories are the registries in memory of the running tests, by name.
var memories sync.Map

// newMemory makes a registry in memory that configs can name until the test ends.
func newMemory(t testing.TB) (string, *discoverytest.Memory) {
	t.Helper()
	return t.Name(), addMemory(t, t.Name())
}

// addMemory makes one with a name.
func addMemory(t testing.TB, name string) *discoverytest.Memory {
	t.Helper()
	m := discoverytest.NewMemory()
	memories.Store(name, m)
	t.Cleanup(func() { memories.Delete(name) })
	return m
}

// memoryBackend stands for somebody else's backend, and lets the tests of the
// modules do without a server.
type memoryBackend struct {
	backend.Options
	Name    string `json:"name,omitempty"`
	Address string `json:"address,omitempty"`
	Login   bool   `json:"login,omitempty"`
}

func (memoryBackend) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "discovery.registries.memory", New: func() caddy.Module { return new(memoryBackend) }}
}

func (b *memoryBackend) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if !d.Args(&b.Name) {
		return d.ArgErr()
	}
	return b.UnmarshalBlock(d, "memory", map[string]func([]string) error{
		"address": func(args []string) error {
			b.Address = args[0]
			return nil
		},
		"login": func(args []string) error {
			b.Login = args[0] == "on"
			return nil
		},
	})
}

func (b *memoryBackend) Open(*slog.Logger) (discovery.Registry, error) {
	m, ok := memories.Load(b.Name)
	if !ok {
		return nil, fmt.Errorf("no registry in memory is named %q", b.Name)
	}
	return m.(*discoverytest.Memory).Open(), nil
}

// offline are the registries in memory whose addresses do not resolve.
var offline sync.Map

// moved are other addresses of registries in memory.
var moved sync.Map // name → host:port

func (b *memoryBackend) Addresses() []string {
	if address, ok := moved.Load(b.Name); ok {
		return []string{address.(string)}
	}
	if _, ok := offline.Load(b.Name); ok {
		return []string{"127.0.0.1:no-such-port"}
	}
	if b.Address != "" {
		return []string{b.Address}
	}
	return []string{"127.0.0.1:4222"}
}

func (b *memoryBackend) HasLogin() bool { return b.Login }

var (
	_ backend.Backend       = (*memoryBackend)(nil)
	_ backend.LoginReporter = (*memoryBackend)(nil)
)
