package discovery

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// restoring is a restorer of nodes a, b and c at 10.0.0.1 to 3, and what it says.
type restoring struct {
	*restorer
	up      map[string]bool // by address
	refusal error           // what those say that are not
	dialled []string
	shown   map[string]*Entry
}

func newRestoring() *restoring {
	r := &restoring{up: make(map[string]bool), refusal: syscall.ECONNREFUSED, shown: make(map[string]*Entry)}
	p := newProber(newDialer(Options{Probe: func(_ context.Context, address string) error {
		r.dialled = append(r.dialled, address)
		if !r.up[address] {
			return r.refusal
		}
		return nil
	}}))
	show := func(id string, e *Entry) { r.shown[id] = e }
	r.restorer = newRestorer(p, DefaultTTL, func(string) Override { return Override{} }, show, new(Journal))
	r.list = &savedList{}
	for i, id := range []string{"a", "b", "c"} {
		e := entryAt(id, fmt.Sprintf("http://10.0.0.%d:80", i+1))
		r.list.nodes = append(r.list.nodes, savedNode{key: "node." + id, heard: time.Now(), node: e.Node})
	}
	return r
}

// pass lets it work for a time, one probe after the other.
func (r *restoring) pass(t *testing.T, d time.Duration) {
	end := time.After(d)
	for {
		if len(r.prober.waiting) > 0 && r.prober.running == 0 {
			waiting := r.prober.waiting[1:]
			r.prober.waiting = r.prober.waiting[:1]
			r.prober.dialWaiting(t.Context(), 0)
			r.prober.waiting = append(r.prober.waiting, waiting...)
		}
		select {
		case a := <-r.prober.done:
			r.prober.take(a, answer.deliver)
		case <-r.timer.C:
			r.probeDue()
		case <-end:
			return
		}
	}
}

func (r *restoring) expect(t *testing.T, want, when string) {
	t.Helper()
	var got []string
	for id, e := range r.shown {
		if e != nil {
			got = append(got, fmt.Sprint(id, ":", e.State()))
		}
	}
	slices.Sort(got)
	if strings.Join(got, " ") != want {
		t.Errorf("%s [%s] are shown, want [%s]", when, strings.Join(got, " "), want)
	}
}

func TestRestorerUsesWhatAccepts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRestoring()
		r.up["10.0.0.1:80"], r.up["10.0.0.2:80"] = true, true
		if r.begin() {
			t.Error("it begins before anybody asked")
		}
		r.wanted = true
		if !r.begin() || r.begin() {
			t.Error("it does not begin once")
		}
		r.pass(t, time.Second)
		r.expect(t, "a:restored b:restored", "of which two accept")
		r.up["10.0.0.1:80"], r.up["10.0.0.3:80"] = false, true
		r.pass(t, DefaultTTL)
		r.expect(t, "b:restored c:restored", "a lease later, another two accept")
		r.dropRecord("node.b")
		r.expect(t, "c:restored", "one left")
		r.reject("node.c", ErrInvalid, 7)
		list, nodes := r.end()
		if list == nil || len(nodes) != 2 || !nodes["c"].inUse || nodes["a"].inUse || nodes["c"].rejected == nil || nodes["c"].watch != 7 {
			t.Errorf("at the end there are %v", nodes)
		}
		before := len(r.dialled)
		r.pass(t, 10*DefaultTTL)
		if len(r.dialled) != before || r.begin() {
			t.Error("it goes on after its end")
		}
	})
}

// An answer that comes when its node has left, or the list is used no more, counts for
// nothing.
func TestRestorerIgnoresLateAnswers(t *testing.T) {
	for name, test := range map[string]struct {
		meanwhile func(r *restoring)
		want      string
	}{
		"one left":          {func(r *restoring) { r.dropRecord("node.a") }, "b:restored c:restored"},
		"the registry came": {func(r *restoring) { r.end() }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRestoring()
				r.wanted = true
				for _, address := range []string{"10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"} {
					r.up[address] = true
				}
				r.begin()
				for len(r.prober.waiting) > 0 { // one after the other, as the probe is not for many
					waiting := r.prober.waiting
					r.prober.waiting = waiting[:1:1]
					r.prober.dialWaiting(t.Context(), 0)
					r.prober.waiting = waiting[1:]
					synctest.Wait()
				}
				test.meanwhile(r)
				r.pass(t, time.Second)
				r.expect(t, test.want, "the answers are here")
			})
		})
	}
}

// A node in use that this machine may not dial stays for a few times in a row.
func TestRestorerKeepsWhoCannotBeDialled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRestoring()
		r.wanted, r.refusal = true, syscall.EACCES
		for _, address := range []string{"10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80"} {
			r.up[address] = true
		}
		r.begin()
		r.pass(t, time.Second)
		const all = "a:restored b:restored c:restored"
		for _, round := range []struct {
			up     bool
			leases time.Duration
			want   string
		}{
			{false, maxForbidden, all},
			{true, 1, all},
			{false, maxForbidden, all},
			{false, 1, ""},
		} {
			for address := range r.up {
				r.up[address] = round.up
			}
			r.pass(t, round.leases*DefaultTTL)
			r.expect(t, round.want, fmt.Sprintf("%+v", round))
		}
	})
}

// A node that leaves while it is being asked does not keep the others from being asked
// again.
func TestRestorerGoesOnWithoutNodesThatLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRestoring()
		r.wanted = true
		r.begin()
		r.pass(t, time.Second)
		r.byID["a"].next -= time.Second
		r.due.put(r.byID["a"])
		r.arm()
		<-r.timer.C
		r.probeDue() // a alone
		r.dropRecord("node.a")
		before := len(r.dialled)
		r.pass(t, 2*DefaultTTL)
		if asked := strings.Join(r.dialled[before:], " "); !strings.Contains(asked, "10.0.0.2") || !strings.Contains(asked, "10.0.0.3") {
			t.Errorf("asked again are [%s]", asked)
		}
	})
}
