package discovery_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// wrapped changes nothing of a registry, but that it counts what is asked of it.
type wrapped struct {
	discovery.Registry
	announced int
}

func (w *wrapped) Unwrap() discovery.Registry { return w.Registry }

func (w *wrapped) Announce(ctx context.Context, n discovery.Node) error {
	w.announced++
	return w.Registry.Announce(ctx, n)
}

// sealed hides all but what every registry has.
type sealed struct{ discovery.Registry }

func TestAsFindsWhatIsWrapped(t *testing.T) {
	inner := discoverytest.NewMemory().Open()
	outer := &wrapped{Registry: &wrapped{Registry: inner}}
	if o, ok := discovery.As[discovery.Overrider](outer); !ok || o != inner.(discovery.Overrider) {
		t.Errorf("found %v, %v", o, ok)
	}
	if a, ok := discovery.As[discovery.Announcer](outer); !ok || a != discovery.Announcer(outer) {
		t.Errorf("what is outside comes first: found %v", a)
	}
	if _, ok := discovery.As[discovery.Overrider](sealed{inner}); ok {
		t.Error("found what is hidden")
	}
	if _, ok := discovery.As[interface{ Nonsense() }](outer); ok {
		t.Error("found what there is not")
	}
	if _, ok := discovery.As[discovery.Verifier](nil); ok {
		t.Error("found something in nothing")
	}
}

// A directory asks a wrapped registry whether its stream is alive, and a registrar asks
// it for the record.
func TestWrappedRegistryKeepsWhatItCanDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("x"))
		d := follow(t, &wrapped{Registry: m.Open()}, discovery.Options{Probe: nobodyThere})
		blind := follow(t, sealed{m.Open()}, discovery.Options{Probe: nobodyThere})
		m.Silence(true) // connected, and nothing comes through
		time.Sleep(time.Hour)
		if got, without := d.Status().Nodes, blind.Status().Nodes; got != 1 || without != 0 {
			t.Errorf("%d nodes by a watch that can be verified, %d by another; want 1 and 0", got, without)
		}
		m.Silence(false)

		lines := make([]*logged, 2)
		for i := range lines {
			log, logs := newLog(0)
			lines[i] = logs
			register(t, &wrapped{Registry: m.Open()}, newNode("y"), discovery.RegistrarOptions{Logger: log})
		}
		time.Sleep(10 * time.Minute)
		for _, logs := range lines {
			if got := len(logs.containing("another process announces the same node")); got != 1 {
				t.Errorf("the conflict was told %d times: %v", got, logs.all())
			}
		}
	})
}
