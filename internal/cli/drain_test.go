package cli

import (
	"errors"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

// TestWhenANodeIsIdle tells a proxy's story, one answer a second.
func TestWhenANodeIsIdle(t *testing.T) {
	began := time.Now()
	node := func(state string, inFlight int, session time.Duration) []view.Node {
		n := view.Node{Registry: "r", ID: "a", State: state, InFlight: &inFlight}
		if session > 0 {
			at := began.Add(session - time.Hour) // by another clock
			n.LastSession = &at
		}
		return []view.Node{n}
	}
	failed := errors.New("no answer")
	for name, story := range map[string][]struct {
		nodes []view.Node
		err   error
		idle  bool // for two seconds
		says  string
	}{
		"it drains": {
			{node("up", 0, 0), nil, false, "it is up there"},
			{node("draining", 2, 0), nil, false, "2 in flight"},
			{node("draining", 1, 0), nil, false, "1 in flight"},
			{node("draining", 0, 0), nil, false, "idle"},
			{node("draining", 0, 0), nil, false, "idle"},
			{node("draining", 0, 0), nil, true, "idle"},
		},
		"what was before the first look nobody knows": {
			{node("draining", 0, 0), nil, false, "idle"},
			{node("draining", 0, 0), nil, false, "idle"},
			{node("draining", 0, 0), nil, true, "idle"},
		},
		"sessions between two looks": {
			{node("draining", 0, 1), nil, false, "none in flight, sessions still come"},
			{node("draining", 0, 1), nil, false, "none in flight, sessions still come"},
			{node("draining", 0, 2), nil, false, "none in flight, sessions still come"},
			{node("draining", 0, 2), nil, false, "none in flight, sessions still come"},
			{node("draining", 0, 2), nil, true, "none in flight, sessions still come"},
		},
		"a request between two": {
			{node("draining", 0, 0), nil, false, "idle"},
			{node("draining", 1, 0), nil, false, "1 in flight"},
			{node("draining", 0, 0), nil, false, "idle"},
			{node("draining", 0, 0), nil, false, "idle"},
			{node("draining", 0, 0), nil, true, "idle"},
		},
		"it is gone": {
			{node("draining", 3, 0), nil, false, "3 in flight"},
			{nil, nil, true, "it is gone"},
		},
		"a proxy that counts nothing": {
			{[]view.Node{{Registry: "r", ID: "a", State: "draining"}}, nil, false, "it does not tell what is in flight; its plugin may be of an earlier version"},
		},
		"the proxy is away for a while": {
			{node("draining", 0, 0), nil, false, "idle"},
			{nil, failed, false, "no answer"},
			{node("draining", 0, 0), nil, false, "idle"},
			{node("draining", 0, 0), nil, false, "idle"},
			{node("draining", 0, 0), nil, true, "idle"},
		},
		"another registry lists the id": {
			{append(node("draining", 0, 0), view.Node{Registry: "other", ID: "a", State: "up", InFlight: new(int)}), nil, false, "idle"},
		},
		"the registry has another name there": {
			{[]view.Node{{Registry: "other", ID: "a", State: "up", InFlight: new(int)}}, nil, false, "it is up there"},
		},
		"somebody undrains it": {
			{node("draining", 0, 0), nil, false, "idle"},
			{node("up", 0, 0), nil, false, "it is up there"},
			{node("up", 0, 0), nil, false, "it is up there"},
		},
	} {
		p := &drainingProxy{address: "x"}
		for i, s := range story {
			now := began.Add(time.Duration(i) * time.Second)
			p.heard(s.nodes, s.err, "r", now)
			if idle := p.idle(2*time.Second, now); idle != s.idle || p.says != s.says {
				t.Errorf("%s: after answer %d: idle %v, %q, want %v, %q", name, i+1, idle, p.says, s.idle, s.says)
			}
		}
	}
}

func TestFlagsOfWaiting(t *testing.T) {
	for _, test := range []struct {
		args []string
		good bool
	}{
		{nil, true},
		{[]string{"--wait", "1m"}, true},
		{[]string{"--wait", "1m", "--idle", "1m", "--address", "a:1", "--address", "b:1"}, true},
		{[]string{"--wait", "0s"}, false},
		{[]string{"--wait", "-1s"}, false},
		{[]string{"--wait", "20s"}, false}, // shorter than idle
		{[]string{"--wait", "20s", "--idle", "0s"}, false},
		{[]string{"--idle", "1s"}, false},
		{[]string{"--address", "a:1"}, false},
	} {
		var f waitFlags
		cmd := new(cobra.Command)
		f.add(cmd)
		if err := cmd.ParseFlags(test.args); err != nil {
			t.Fatal(err)
		}
		if err := f.check(cmd); (err == nil) != test.good {
			t.Errorf("%q: %v", test.args, err)
		}
	}
}
