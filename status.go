package caddydiscovery

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

func init() {
	caddy.RegisterModule(new(StatusPage))
	httpcaddyfile.RegisterHandlerDirective("discovery_status", parseStatusPage)
	httpcaddyfile.RegisterDirectiveOrder("discovery_status", httpcaddyfile.Before, "reverse_proxy")
}

const (
	defaultMaxStreams = 16

	// A reader who takes longer than this for what is sent to him has gone.
	streamWriteTimeout = 10 * time.Second
	// How often the page is told of heartbeats, and at most how often of changes.
	vitalsInterval = time.Second
	changeInterval = 50 * time.Millisecond
	// How many nodes one message carries, and how much of the journal a new reader
	// gets.
	nodesAtOnce    = 500
	journalAtFirst = 300
)

// StatusPage is a handler that serves one page, which shows the registries that
// this proxy watches, the fleet, and what becomes of it, live. The page has no
// external parts.
//
// It shows the topology of the fleet. Unless the connection comes from loopback and
// asks for a loopback name or address (so that no page with a name of its own reads
// it in a browser on this machine), or comes from an address that is allowed, the
// answer is 403. What counts is the address of the connection, not one in a header:
// behind another proxy on the same machine everybody comes from loopback, the page
// needs 'allow 127.0.0.1', and something else must guard it.
type StatusPage struct {
	// The networks (in CIDR notation, or single addresses) that may see the page
	// beside loopback, by whatever name. Default: none
	Allow []string `json:"allow,omitempty"`

	// How many pages may be kept up to date at one time, in the whole process.
	// Default: 16
	MaxStreams int `json:"max_streams,omitempty"`

	allow    []netip.Prefix
	stopping chan struct{}
}

// CaddyModule returns the Caddy module information.
func (*StatusPage) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.handlers.discovery_status",
		New: func() caddy.Module { return new(StatusPage) },
	}
}

// Provision sets up the handler.
func (p *StatusPage) Provision(ctx caddy.Context) error {
	for _, s := range p.Allow {
		network, err := parseNetwork(s)
		if err != nil {
			return fmt.Errorf("allow: %w", err)
		}
		p.allow = append(p.allow, network)
	}
	switch {
	case p.MaxStreams < 0:
		return fmt.Errorf("max_streams: invalid number %d, want 1 or more", p.MaxStreams)
	case p.MaxStreams == 0:
		p.MaxStreams = defaultMaxStreams
	}
	// Caddy waits for open requests before it lets go of a config. A stream would
	// hold it for ever; the page connects anew, to the config that comes next.
	p.stopping = make(chan struct{})
	return onEvent(ctx, "stopping", func() { close(p.stopping) })
}

// parseNetwork reads a network, or a single address.
func parseNetwork(s string) (netip.Prefix, error) {
	network, err := netip.ParsePrefix(s)
	if err != nil {
		address, err := netip.ParseAddr(s)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("invalid network %q, want one such as 10.0.0.0/8 or fd00::/8", s)
		}
		network = netip.PrefixFrom(address, address.BitLen())
	}
	return network.Masked(), nil
}

// parseStatusPage sets up the handler from Caddyfile tokens. Syntax:
//
//	discovery_status [<matcher>] {
//	    allow       <cidr|private_ranges...>
//	    max_streams <n>
//	}
func parseStatusPage(h httpcaddyfile.Helper) (caddyhttp.MiddlewareHandler, error) {
	p := new(StatusPage)
	return p, p.UnmarshalCaddyfile(h.Dispenser)
}

// UnmarshalCaddyfile sets up the handler from Caddyfile tokens, as parseStatusPage
// describes.
func (p *StatusPage) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next() // consume the name
	if d.NextArg() {
		return d.Errf("discovery_status: unexpected argument %q, want none but a matcher", d.Val())
	}
	return caddyblock.Block{What: "discovery_status", Options: caddyblock.Options{
		"allow": {Usage: "<cidr|private_ranges...>", Min: 1, Max: -1, Repeatable: true, Set: func(args []string) error {
			for _, arg := range args {
				if arg == "private_ranges" {
					p.Allow = append(p.Allow, privateRanges...)
					continue
				}
				if _, err := parseNetwork(arg); err != nil {
					return err
				}
				p.Allow = append(p.Allow, arg)
			}
			return nil
		}},
		"max_streams": caddyblock.Number(&p.MaxStreams, 1, 10_000),
	}}.Parse(d)
}

// privateRanges are what private_ranges means to Caddy's own directives.
var privateRanges = []string{"192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8", "127.0.0.1/8", "fd00::/8", "::1"}

// ServeHTTP serves the page, or, if the query says "stream", what keeps it up to
// date.
func (p *StatusPage) ServeHTTP(w http.ResponseWriter, r *http.Request, _ caddyhttp.Handler) error {
	if err := p.mayLook(r); err != nil {
		return caddyhttp.Error(http.StatusForbidden, err)
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		return caddyhttp.Error(http.StatusMethodNotAllowed, errors.New("the status page wants GET or HEAD"))
	}
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	header.Set("X-Frame-Options", "DENY")
	if r.URL.Query().Has("stream") {
		return p.serveStream(w, r)
	}
	header.Set("Content-Security-Policy", statusPage.policy)
	header.Set("Content-Type", "text/html; charset=utf-8")
	header.Set("Content-Length", strconv.Itoa(len(statusPage.html)))
	if r.Method == http.MethodGet {
		_, _ = w.Write(statusPage.html)
	}
	return nil
}

// mayLook returns why a request may not see the page.
//
// That a connection comes from loopback says that it comes from this machine, not
// who speaks: a page of anybody's that a browser shows here may have a name that has
// come to mean 127.0.0.1 (DNS rebinding), and would read what it asks for. Such a
// request names that page, in Host or in Origin.
func (p *StatusPage) mayLook(r *http.Request) error {
	address, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return errNotAllowed
	}
	remote := address.Addr().Unmap().WithZone("")
	switch {
	case slices.ContainsFunc(p.allow, func(n netip.Prefix) bool { return n.Contains(remote) }):
		return nil
	case !remote.IsLoopback():
		return errNotAllowed
	case !isLoopback(hostname(r.Host)):
		return errors.New("the status page is served to loopback by a loopback name or address only, such as localhost, unless 'allow' names 127.0.0.1")
	}
	for _, origin := range r.Header.Values("Origin") {
		if _, host, _ := strings.Cut(origin, "://"); !strings.EqualFold(host, r.Host) {
			return errors.New("the status page is no part of another page")
		}
	}
	return nil
}

var errNotAllowed = errors.New("the status page is for loopback and 'allow' only")

// hostname returns the host without its port.
func hostname(host string) string {
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
}

//go:embed status/page.html
var statusHTML string

//go:embed status/page.css
var statusCSS string

//go:embed status/page.js
var statusJS string

// statusPage is the page in one piece, and the policy that lets nothing in it run
// or load but what it is made of.
var statusPage = func() (page struct {
	html   []byte
	policy string
}) {
	page.html = []byte(strings.NewReplacer("{{style}}", statusCSS, "{{script}}", statusJS).Replace(statusHTML))
	hash := func(s string) string {
		sum := sha256.Sum256([]byte(s))
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	page.policy = "default-src 'none'; script-src " + hash(statusJS) + "; style-src " + hash(statusCSS) +
		"; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	return page
}()

// streams counts the pages that are kept up to date.
var streams atomic.Int64

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
	s := &statusStream{w: w, control: http.NewResponseController(w), ended: r.Context().Done(), stopping: p.stopping}
	s.run()
	return nil
}

// statusStream keeps one page up to date, by server-sent events:
//
//	hello       forget everything
//	registries  all of them
//	nodes       these are new, or their records are
//	gone        these are not there any more
//	rejected    all rejected records of a registry
//	vitals      heartbeats, and changes of health
//	journal     more of it
//	ready       that was all there is for now
//
// It belongs to the goroutine of the request.
type statusStream struct {
	w               http.ResponseWriter
	control         *http.ResponseController
	ended, stopping <-chan struct{}
	out             bytes.Buffer
	followed        []*followedDirectory
}

// followedDirectory is what the page knows of a directory.
type followedDirectory struct {
	*sharedDirectory
	snapshot   *discovery.Snapshot
	rejections []discovery.Rejection
	number     uint64 // of the last change of the journal
	vitals     map[*discovery.Entry]vitalSigns
}

// vitalSigns is what a heartbeat or a health check changes.
type vitalSigns struct {
	heard         time.Time
	load          float64
	state, reason string
}

type statusNode struct {
	Directory int     `json:"r"`
	Lease     float64 `json:"lease"`
	Weight    float64 `json:"weight"`
	nodeView
}

type statusVitals struct {
	Directory int            `json:"r"`
	ID        string         `json:"id"`
	Load      float64        `json:"load"`
	LeaseLeft float64        `json:"lease_left"`
	State     string         `json:"state"`
	Reason    string         `json:"reason"`
	Sources   []standingView `json:"sources"`
}

type statusGone struct {
	Directory int    `json:"r"`
	ID        string `json:"id"`
}

type statusRejected struct {
	Directory int          `json:"r"`
	Nodes     []statusNode `json:"nodes"`
}

func (s *statusStream) run() {
	s.out.WriteString("retry: 1000\n\n")
	s.send("hello", struct{}{})
	for _, d := range runningDirectories() {
		s.followed = append(s.followed, &followedDirectory{sharedDirectory: d, snapshot: new(discovery.Snapshot), vitals: make(map[*discovery.Entry]vitalSigns)})
	}
	s.sendRegistries()
	s.sendFirstJournal()
	if !s.sendChanges() {
		return
	}
	s.send("ready", struct{}{})
	tick := time.NewTicker(vitalsInterval)
	defer tick.Stop()
	pause := time.NewTimer(0)
	defer pause.Stop()
	for s.flush() {
		// Rather a little late than a hundred times a second.
		pause.Reset(changeInterval)
		select {
		case <-s.ended:
			return
		case <-s.stopping:
			return
		case <-pause.C:
		}
		switch s.wait(tick.C) {
		case 0, 1:
			return
		case 2:
			s.sendRegistries()
			s.sendVitals()
		}
		if !s.sendChanges() {
			return
		}
	}
}

// wait returns when something happened: 0 if the reader is gone, 1 if the config
// ends, 2 if it is time to look at heartbeats, more if there are changes.
func (s *statusStream) wait(tick <-chan time.Time) int {
	cases := []reflect.SelectCase{
		{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(s.ended)},
		{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(s.stopping)},
		{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(tick)},
	}
	for _, d := range s.followed {
		_, more := d.Journal().Since(d.number)
		cases = append(cases,
			reflect.SelectCase{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(d.snapshot.Superseded())},
			reflect.SelectCase{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(more)})
	}
	chosen, _, _ := reflect.Select(cases)
	return chosen
}

// send adds an event to what is sent next.
func (s *statusStream) send(name string, v any) {
	s.out.WriteString("event: " + name + "\ndata: ")
	data, err := json.Marshal(v)
	if err != nil {
		data = []byte("null") // views hold nothing that cannot be encoded
	}
	s.out.Write(data)
	s.out.WriteString("\n\n")
}

// flush sends what was added, and reports whether the reader took it.
func (s *statusStream) flush() bool {
	if s.out.Len() == 0 {
		return true
	}
	// Not every connection can limit how long a write takes.
	_ = s.control.SetWriteDeadline(time.Now().Add(streamWriteTimeout))
	_, err := s.w.Write(s.out.Bytes())
	s.out.Reset()
	return err == nil && s.control.Flush() == nil
}

func (s *statusStream) sendRegistries() {
	views := make([]registryView, len(s.followed))
	for i, d := range s.followed {
		views[i] = d.view()
	}
	s.send("registries", views)
}

func (s *statusStream) sendFirstJournal() {
	type change struct {
		at   time.Time
		view changeView
	}
	var changes []change
	for _, d := range s.followed {
		newest := d.Journal().Newest(journalAtFirst, nil)
		if len(newest) > 0 {
			d.number = newest[0].Number
		}
		for _, c := range newest {
			changes = append(changes, change{c.Time, viewChange(d.name(), c)})
		}
	}
	slices.SortStableFunc(changes, func(a, b change) int { return a.at.Compare(b.at) })
	changes = changes[max(len(changes)-journalAtFirst, 0):]
	views := make([]changeView, len(changes))
	for i, c := range changes {
		views[i] = c.view
	}
	s.send("journal", views)
}

// sendChanges sends how the directories differ from what was sent before.
func (s *statusStream) sendChanges() bool {
	sources := sourcesOf()
	for i, d := range s.followed {
		for {
			changes, _ := d.Journal().Since(d.number)
			if changes == nil {
				break
			}
			views := make([]changeView, len(changes))
			for i, c := range changes {
				d.number, views[i] = c.Number, viewChange(d.name(), c)
			}
			s.send("journal", views)
		}
		if next := d.Snapshot(); next != d.snapshot {
			if !s.sendDifference(i, d, next, sources[d.sharedDirectory]) {
				return false
			}
			d.snapshot = next
		}
		if rejections := d.Status().Rejections; !sameSlice(rejections, d.rejections) {
			d.rejections = rejections
			m := statusRejected{Directory: i, Nodes: make([]statusNode, len(rejections))}
			for j, r := range rejections {
				m.Nodes[j] = statusNode{Directory: i, nodeView: viewRejection(d.name(), r)}
			}
			s.send("rejected", m)
		}
	}
	return true
}

// sendDifference sends how one snapshot differs from the one before. Entries never
// change, so that equal pointers are equal nodes.
func (s *statusStream) sendDifference(i int, d *followedDirectory, next *discovery.Snapshot, sources []namedSource) bool {
	was, is := d.snapshot.Nodes(), next.Nodes()
	var gone []statusGone
	var nodes []statusNode
	name := d.name()
	for len(was) > 0 || len(is) > 0 {
		order := 0
		switch {
		case len(was) == 0:
			order = 1
		case len(is) == 0:
			order = -1
		default:
			order = cmp.Compare(was[0].Node.ID, is[0].Node.ID)
		}
		switch {
		case order < 0:
			gone = append(gone, statusGone{i, was[0].Node.ID})
		case order > 0 || was[0] != is[0]:
			e := is[0]
			nodes = append(nodes, statusNode{i, seconds(e.LeaseEnd().Sub(e.LastHeard())), e.Weight(), viewNode(name, e, sources)})
			d.vitals[e] = signsOf(e, sources)
		}
		if order <= 0 {
			if len(is) == 0 || was[0] != is[0] {
				delete(d.vitals, was[0])
			}
			was = was[1:]
		}
		if order >= 0 {
			is = is[1:]
		}
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

func signsOf(e *discovery.Entry, sources []namedSource) vitalSigns {
	state, reason := stateOf(e, sources)
	return vitalSigns{e.LastHeard(), e.Load(), state, reason}
}

// sendVitals sends which nodes were heard since.
func (s *statusStream) sendVitals() {
	sources := sourcesOf()
	var vitals []statusVitals
	for i, d := range s.followed {
		of := sources[d.sharedDirectory]
		for _, e := range d.snapshot.Nodes() {
			signs := signsOf(e, of)
			if signs == d.vitals[e] {
				continue
			}
			d.vitals[e] = signs
			v := viewNode("", e, of)
			vitals = append(vitals, statusVitals{i, v.ID, v.Load, v.LeaseLeft, v.State, v.Reason, v.Sources})
		}
	}
	if len(vitals) > 0 {
		s.send("vitals", vitals)
	}
}

// sameSlice reports whether two slices are one.
func sameSlice[T any](a, b []T) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// Interface guards
var (
	_ caddy.Provisioner           = (*StatusPage)(nil)
	_ caddyfile.Unmarshaler       = (*StatusPage)(nil)
	_ caddyhttp.MiddlewareHandler = (*StatusPage)(nil)
)
