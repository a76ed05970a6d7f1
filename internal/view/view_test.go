package view

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// inBubble runs a test with a directory of a registry in memory, whose nodes nobody
// dials, in a bubble of testing/synctest.
func inBubble(t *testing.T, test func(t *testing.T, m *discoverytest.Memory, d *discovery.Directory)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := discovery.NewDirectory(m.Open(), discovery.Options{RecordsOnly: true})
		ctx, cancel := context.WithCancel(context.Background())
		var running sync.WaitGroup
		running.Go(func() { _ = d.Run(ctx) })
		defer running.Wait()
		defer cancel()
		synctest.Wait()
		test(t, m, d)
	})
}

func list(m *discoverytest.Memory, id, metadata string) {
	m.Put(id, fmt.Appendf(nil, `{"nodeId":%q,"endpoint":"http://10.0.0.1:80","load":0.5,"metadata":{%s}}`, id, metadata))
	synctest.Wait()
}

func source(name, reason string, unhealthy bool) Source {
	return Source{Name: name, Standing: func(*discovery.Entry) (string, bool) { return reason, unhealthy }}
}

func TestStatesOfNodes(t *testing.T) {
	inBubble(t, func(t *testing.T, m *discoverytest.Memory, d *discovery.Directory) {
		list(m, "up", ``)
		list(m, "draining", `"state":"draining"`)
		list(m, "light", `"weight":"0"`)
		list(m, "drained", ``)
		overrider, _ := discovery.As[discovery.Overrider](m.Open())
		if err := overrider.SetOverride(context.Background(), "drained", discovery.Override{State: discovery.StateDraining}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		well, other, ill := source("a", "", false), source("b", "where zone", false), source("c", "unhealthy: not checked yet", true)
		for _, test := range []struct {
			id      string
			sources []Source
			want    string
		}{
			{"up", nil, "up: "},
			{"up", []Source{well, other}, "up: "},
			{"up", []Source{well, other, ill}, "unhealthy: unhealthy: not checked yet"},
			{"draining", []Source{ill}, "draining: "},
			{"light", nil, "up: weight 0"},
			{"light", []Source{ill}, "unhealthy: unhealthy: not checked yet"},
			{"drained", []Source{ill}, "draining: operator: state draining"},
		} {
			state, reason := StateOf(d.Snapshot().Node(test.id), test.sources)
			if got := state + ": " + reason; got != test.want {
				t.Errorf("%s with %d sources is %q, want %q", test.id, len(test.sources), got, test.want)
			}
		}
		time.Sleep(time.Hour) // all leases have run out, which is no evidence about any node
		if state, reason := StateOf(d.Snapshot().Node("up"), []Source{ill}); state != "held" || !strings.Contains(reason, "lease ran out") {
			t.Errorf("after its lease it is %s: %s", state, reason)
		}
		if r := OfRegistry("r", "memory", d.Status()); r.Nodes == 0 || !r.Connected || !r.Synced || r.Restored || r.LastEvent == nil || r.StaleFor != 0 {
			t.Errorf("the registry is shown as %+v", r)
		}
		m.Break()
		time.Sleep(3 * time.Second)
		if r := OfRegistry("r", "memory", d.Status()); r.Connected || r.LastError == "" || r.StaleFor < 1 {
			t.Errorf("the lost registry is shown as %+v", r)
		}
	})
}

func TestNodeInJSON(t *testing.T) {
	inBubble(t, func(t *testing.T, m *discoverytest.Memory, d *discovery.Directory) {
		heard := time.Now()
		list(m, "a", `"service":"orders"`)
		time.Sleep(10*time.Second + 1234567*time.Nanosecond)
		m.Put("a", []byte("nonsense"))
		time.Sleep(time.Second)
		got, err := json.Marshal(OfNode("r", d.Snapshot().Node("a"), []Source{source("b", "service", false), source("c", "", false)}))
		want := `{"registry":"r","id":"a","endpoint":"http://10.0.0.1:80","address":"10.0.0.1:80","service":"orders","load":0.5,` +
			`"metadata":{"service":"orders"},"last_heard":"` + heard.Format(time.RFC3339Nano) + `","lease_left":18.998,"state":"up",` +
			`"reason":"as it was last known, its newest record is rejected: invalid record: want a JSON object",` +
			`"sources":[{"source":"b","eligible":false,"reason":"service"},{"source":"c","eligible":true,"reason":""}]}`
		if err != nil || string(got) != want {
			t.Errorf("%v\n%s, want\n%s", err, got, want)
		}
	})
}

func TestRejectionInJSON(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, r := range []discovery.Rejection{{ID: "a", Key: "k"}, {Key: "a"}} {
		r.Time, r.Err = at, errors.New("broken")
		got, err := json.Marshal(OfRejection("r", r))
		want := `{"registry":"r","id":"a","endpoint":"","address":"","service":"","load":0,"metadata":{},` +
			`"last_heard":"2026-01-02T03:04:05Z","lease_left":0,"state":"rejected","reason":"broken","sources":[]}`
		if err != nil || string(got) != want {
			t.Errorf("%v\n%s, want\n%s", err, got, want)
		}
	}
}

func TestArray(t *testing.T) {
	for _, elements := range [][]any{nil, {1}, {1, "two", map[string]int{"three": 3}}} {
		var b bytes.Buffer
		a := NewArray(&b)
		for _, v := range elements {
			a.Add(v)
		}
		a.End()
		var read []any
		if err := json.Unmarshal(b.Bytes(), &read); err != nil || len(read) != len(elements) {
			t.Errorf("%v became %s: %v", elements, b.String(), err)
		}
	}
}

func TestSeconds(t *testing.T) {
	for d, want := range map[time.Duration]float64{0: 0, 1500 * time.Millisecond: 1.5, 999 * time.Microsecond: 0, time.Hour: 3600} {
		if got := Seconds(d); got != want {
			t.Errorf("%v is shown as %v, want %v", d, got, want)
		}
	}
	if d := Duration(1.5); d != 1500*time.Millisecond {
		t.Errorf("1.5 seconds are %v", d)
	}
}
