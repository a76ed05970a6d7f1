package discoverytest

import (
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestMemory(t *testing.T) {
	Run(t, func(*testing.T) Harness { return memoryHarness{NewMemory()} })
}

type memoryHarness struct{ m *Memory }

func (h memoryHarness) Open(*testing.T) discovery.Registry    { return h.m.Open() }
func (h memoryHarness) Write(_ *testing.T, id, record string) { h.m.Put(id, []byte(record)) }
func (h memoryHarness) Break(*testing.T)                      { h.m.Break() }
func (h memoryHarness) Restore(*testing.T)                    { h.m.Restore() }
