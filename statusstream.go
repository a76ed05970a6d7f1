package caddydiscovery

import (
	"bytes"
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

const (
	// streamWriteTimeout is how long a reader may take for what is sent to him before
	// he counts as gone.
	streamWriteTimeout = 10 * time.Second
	// livenessInterval is how often the page is told of heartbeats, changeInterval at
	// most how often of changes.
	livenessInterval = time.Second
	changeInterval   = 50 * time.Millisecond
	// nodesAtOnce is how many nodes one event carries, journalAtFirst how many entries
	// of the journals a new reader gets.
	nodesAtOnce    = 500
	journalAtFirst = 300
)

// streams counts the pages that are kept up to date.
var streams atomic.Int64

// serveStream keeps one page up to date until its reader or the config is gone.
func (p *StatusPage) serveStream(w http.ResponseWriter, r *http.Request) error {
	if streams.Add(1) > int64(p.MaxStreams) {
		streams.Add(-1)
		w.Header().Set("Retry-After", "10")
		return caddyhttp.Error(http.StatusServiceUnavailable, fmt.Errorf("%d pages are being kept up to date already; max_streams allows more", p.MaxStreams))
	}
	defer streams.Add(-1)
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("X-Accel-Buffering", "no") // of proxies in front
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	s := &statusStream{eventWriter: eventWriter{w: w, control: http.NewResponseController(w)}}
	s.run(r.Context().Done(), p.stopping)
	return nil
}

// eventWriter writes server-sent events.
type eventWriter struct {
	w       http.ResponseWriter
	control *http.ResponseController
	out     bytes.Buffer
}

// send adds an event to what is sent next.
func (w *eventWriter) send(name string, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		data = []byte("null") // views hold nothing that cannot be encoded
	}
	fmt.Fprintf(&w.out, "event: %s\ndata: %s\n\n", name, data)
}

// flush sends what was added, and reports whether the reader took it.
func (w *eventWriter) flush() bool {
	if w.out.Len() == 0 {
		return true
	}
	// Not every connection can limit how long a write takes.
	_ = w.control.SetWriteDeadline(time.Now().Add(streamWriteTimeout))
	_, err := w.w.Write(w.out.Bytes())
	w.out.Reset()
	return err == nil && w.control.Flush() == nil
}

// statusStream keeps one page up to date by these events:
//
//	hello       forget everything
//	registries  all of them
//	nodes       these are new, or their records are
//	gone        these are not there any more
//	rejected    all rejected records of a registry
//	hosts       these are new, or something of them is
//	hosts_gone  these are not there any more
//	liveness    heartbeats, and changes of health
//	journal     more of it
//	ready       that was all there is for now
//
// It belongs to the goroutine of the request.
type statusStream struct {
	eventWriter
	followed []*followedDirectory
}

// followedDirectory is what the page knows of a directory.
type followedDirectory struct {
	*sharedDirectory
	snapshot   *discovery.Snapshot
	rejections []discovery.Rejection
	number     uint64 // of the last change of the journal
	shown      map[*discovery.Entry]liveness
	hosts      map[string]*discovery.Host
}

// liveness is what a heartbeat or a health check changes.
type liveness struct {
	heard         time.Time
	load          float64
	state, reason string
}

func livenessOf(e *discovery.Entry, sources []view.Source) liveness {
	state, reason := view.StateOf(e, sources)
	return liveness{e.LastHeard(), e.Load(), state, reason}
}

type statusNode struct {
	Directory int     `json:"r"`
	Lease     float64 `json:"lease"`
	Weight    float64 `json:"weight"`
	view.Node
}

type statusLiveness struct {
	Directory int             `json:"r"`
	ID        string          `json:"id"`
	Load      float64         `json:"load"`
	LeaseLeft float64         `json:"lease_left"`
	State     string          `json:"state"`
	Reason    string          `json:"reason"`
	Sources   []view.Standing `json:"sources"`
}

type statusGone struct {
	Directory int    `json:"r"`
	ID        string `json:"id"`
}

// run sends what there is, and then what changes, until one of the channels is closed
// or the reader is gone.
func (s *statusStream) run(ended, stopping <-chan struct{}) {
	s.out.WriteString("retry: 1000\n\n")
	s.send("hello", struct{}{})
	s.follow(runningDirectories())
	if !s.sendChanges() {
		return
	}
	s.send("ready", struct{}{})
	tick := time.NewTicker(livenessInterval)
	defer tick.Stop()
	pause := time.NewTimer(0)
	defer pause.Stop()
	for s.flush() {
		pause.Reset(changeInterval)
		select {
		case <-ended:
			return
		case <-stopping:
			return
		case <-pause.C:
		}
		open, ticked := s.wait(ended, stopping, tick.C)
		if !open {
			return
		}
		if ticked {
			s.sendRegistries()
			s.sendLiveness()
		}
		if !s.sendChanges() {
			return
		}
	}
}

// wait returns when there are changes, when the tick comes, or when one of the first
// two channels is closed, after which the stream is not open any more.
func (s *statusStream) wait(ended, stopping <-chan struct{}, tick <-chan time.Time) (open, ticked bool) {
	cases := make([]reflect.SelectCase, 0, 3+2*len(s.followed))
	on := func(channel any) int {
		cases = append(cases, reflect.SelectCase{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(channel)})
		return len(cases) - 1
	}
	endedCase, stoppingCase, tickCase := on(ended), on(stopping), on(tick)
	for _, d := range s.followed {
		_, more := d.Journal().Since(d.number)
		on(d.snapshot.Superseded())
		on(more)
	}
	chosen, _, _ := reflect.Select(cases)
	return chosen != endedCase && chosen != stoppingCase, chosen == tickCase
}

// follow begins with the directories: what they are, and the newest of what became
// of their nodes.
func (s *statusStream) follow(directories []*sharedDirectory) {
	last := make(map[*sharedDirectory]uint64)
	for _, d := range directories {
		last[d] = d.Journal().Last()
		s.followed = append(s.followed, &followedDirectory{
			sharedDirectory: d, snapshot: new(discovery.Snapshot), number: last[d], shown: make(map[*discovery.Entry]liveness),
			hosts: make(map[string]*discovery.Host),
		})
	}
	s.sendRegistries()
	changes := newestChanges(directories, journalAtFirst, func(d *sharedDirectory, c *discovery.Change) bool { return c.Number <= last[d] })
	slices.Reverse(changes)
	s.send("journal", changes)
}

func (s *statusStream) sendRegistries() {
	registries := make([]view.Registry, len(s.followed))
	for i, d := range s.followed {
		registries[i] = d.view()
	}
	s.send("registries", registries)
}

// sendChanges sends how the directories differ from what was sent before, and reports
// whether the reader is still there.
func (s *statusStream) sendChanges() bool {
	for i, d := range s.followed {
		s.sendJournal(d)
		if next := d.Snapshot(); next != d.snapshot {
			if !s.sendDifference(i, d, next, d.namedSources()) || !s.sendHosts(i, d, next.Hosts()) {
				return false
			}
			d.snapshot = next
		}
		if rejections := d.Status().Rejections; !sameSlice(rejections, d.rejections) {
			d.rejections = rejections
			nodes := make([]statusNode, len(rejections))
			for j, r := range rejections {
				nodes[j] = statusNode{Directory: i, Node: view.OfRejection(d.name(), r)}
			}
			s.send("rejected", struct {
				Directory int          `json:"r"`
				Nodes     []statusNode `json:"nodes"`
			}{i, nodes})
		}
	}
	return true
}

// sendJournal sends what has become of the nodes of a directory.
func (s *statusStream) sendJournal(d *followedDirectory) {
	for {
		changes, _ := d.Journal().Since(d.number)
		if changes == nil {
			return
		}
		shown := make([]view.Change, len(changes))
		for i, c := range changes {
			d.number, shown[i] = c.Number, view.OfChange(d.name(), c)
		}
		s.send("journal", shown)
	}
}

// sendDifference sends how the next snapshot of a directory differs from the one
// before, and reports whether the reader is still there.
func (s *statusStream) sendDifference(i int, d *followedDirectory, next *discovery.Snapshot, sources []view.Source) bool {
	var gone []statusGone
	var nodes []statusNode
	name := d.name()
	for was, is := range differences(d.snapshot.Nodes(), next.Nodes()) {
		if was != nil {
			delete(d.shown, was)
		}
		if is == nil {
			gone = append(gone, statusGone{i, was.Node.ID})
			continue
		}
		nodes = append(nodes, statusNode{i, view.Seconds(is.LeaseEnd().Sub(is.LastHeard())), is.Weight(), view.OfNode(name, is, sources)})
		d.shown[is] = livenessOf(is, sources)
		if len(nodes) == nodesAtOnce {
			s.send("nodes", nodes)
			nodes = nodes[:0]
			if !s.flush() {
				return false
			}
		}
	}
	if len(gone) > 0 {
		s.send("gone", gone)
	}
	if len(nodes) > 0 {
		s.send("nodes", nodes)
	}
	return true
}

// statusHost is a host without the names of its nodes, which may be thousands.
type statusHost struct {
	Directory int `json:"r"`
	Count     int `json:"count"`
	view.Host
}

type statusHostGone struct {
	Directory int    `json:"r"`
	Host      string `json:"host"`
}

// sendHosts sends how the hosts of a directory differ from what was sent before, and
// reports whether the reader is still there.
func (s *statusStream) sendHosts(i int, d *followedDirectory, next *discovery.Hosts) bool {
	if next == d.snapshot.Hosts() {
		return true
	}
	var hosts []statusHost
	var gone []statusHostGone
	for h := range next.All() {
		if len(h.Nodes()) == 0 && len(h.Conflicts) == 0 || d.hosts[h.Name] == h {
			continue
		}
		d.hosts[h.Name] = h
		v := d.hostView(h)
		v.Nodes = nil
		hosts = append(hosts, statusHost{i, len(h.Nodes()), v})
		if len(hosts) == nodesAtOnce {
			s.send("hosts", hosts)
			hosts = hosts[:0]
			if !s.flush() {
				return false
			}
		}
	}
	for name := range d.hosts {
		if h := next.Known(name); h == nil || len(h.Nodes()) == 0 && len(h.Conflicts) == 0 {
			delete(d.hosts, name)
			gone = append(gone, statusHostGone{i, name})
		}
	}
	if len(hosts) > 0 {
		s.send("hosts", hosts)
	}
	if len(gone) > 0 {
		s.send("hosts_gone", gone)
	}
	return true
}

// differences yields the entries that two sorted lists have for one id, nil where one
// has none, unless they are the same: entries never change.
func differences(was, is []*discovery.Entry) iter.Seq2[*discovery.Entry, *discovery.Entry] {
	return func(yield func(was, is *discovery.Entry) bool) {
		for len(was) > 0 || len(is) > 0 {
			var before, now *discovery.Entry
			if len(is) == 0 || len(was) > 0 && was[0].Node.ID <= is[0].Node.ID {
				before = was[0]
			}
			if len(was) == 0 || len(is) > 0 && is[0].Node.ID <= was[0].Node.ID {
				now = is[0]
			}
			if before != nil {
				was = was[1:]
			}
			if now != nil {
				is = is[1:]
			}
			if before != now && !yield(before, now) {
				return
			}
		}
	}
}

// sendLiveness sends which nodes were heard since, or are in another state.
func (s *statusStream) sendLiveness() {
	var changed []statusLiveness
	for i, d := range s.followed {
		of := d.namedSources()
		for _, e := range d.snapshot.Nodes() {
			now := livenessOf(e, of)
			if now == d.shown[e] {
				continue
			}
			d.shown[e] = now
			v := view.OfNode("", e, of)
			changed = append(changed, statusLiveness{i, v.ID, v.Load, v.LeaseLeft, v.State, v.Reason, v.Sources})
		}
	}
	if len(changed) > 0 {
		s.send("liveness", changed)
	}
}

// sameSlice reports whether two slices are one.
func sameSlice[T any](a, b []T) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}
