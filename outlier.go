package caddydiscovery

import (
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
	"github.com/caddy-discovery/caddy-discovery/internal/outlier"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
	"github.com/caddy-discovery/caddy-discovery/internal/traffic"
)

// Outlier takes nodes out of use whose requests fail, for some time: they are ejected.
// It watches the requests themselves, so that it sees what active health checks do not
// ask for. A request fails if the node refuses the connection, does not answer, breaks an
// answer off, or answers with a status of 500 to 599 or, by gRPC, 14 (unavailable); but 501,
// 505 and 508 count for nothing, because a client can bring them about by a method, a
// version or a header, and neither does what a client gives up. Each attempt of a request
// counts by itself.
//
// An ejected node gets no requests, as if it were unhealthy; those that are under way go
// on. When its time is over it is in use again, with its first share where slow_start is
// set. Another process, or the same node at another address, begins anew. Where nobody
// else can serve, ejected nodes do.
//
// Sources that use the same nodes with the same settings eject together, also across
// reloads.
type Outlier struct {
	// How many requests to a node must fail in a row. Default: 5
	Errors int `json:"errors,omitempty"`

	// Which share of a node's requests must fail. Default: no share does, only errors in
	// a row
	Rate *OutlierRate `json:"rate,omitempty"`

	// For how long a node is ejected. It doubles for each time in a row, up to ten times
	// as long; after as long without being ejected the node has made good for one time.
	// Default: 30s
	Eject caddy.Duration `json:"eject,omitempty"`

	// How many percent of the nodes that could serve may be ejected at one time, rounded
	// down, but one of two and of three. Nobody is ejected beyond it, whoever fails. Where
	// requests choose the service, by route or a placeholder, each service counts by itself.
	// Default: 50
	MaxEjected int `json:"max_ejected,omitempty"`
}

// OutlierRate is a share of requests that fail.
type OutlierRate struct {
	// So many percent of a node's requests must fail. Required.
	Percent int `json:"percent,omitempty"`

	// Of at least so many requests. Default: 20
	Requests int `json:"requests,omitempty"`

	// In so much time. Default: 30s
	Window caddy.Duration `json:"window,omitempty"`
}

// Bounds of the numbers. A count takes 20 bits in each eighth of a window.
const (
	maxOutlierErrors   = 10_000
	maxOutlierRequests = 100_000
	maxOutlierWindow   = time.Hour
	minOutlierTime     = 100 * time.Millisecond
	maxOutlierEject    = 24 * time.Hour
)

// check completes what was configured, or refuses it.
func (o *Outlier) check() error {
	o.Errors, o.MaxEjected = cmp.Or(o.Errors, 5), cmp.Or(o.MaxEjected, 50)
	o.Eject = cmp.Or(o.Eject, caddy.Duration(30*time.Second))
	if o.Errors < 1 || o.Errors > maxOutlierErrors {
		return fmt.Errorf("outlier: invalid errors %d, want 1 to %d", o.Errors, maxOutlierErrors)
	}
	if o.MaxEjected < 1 || o.MaxEjected > 100 {
		return fmt.Errorf("outlier: invalid max_ejected %d, want 1 to 100 percent", o.MaxEjected)
	}
	if d := time.Duration(o.Eject); d < minOutlierTime || d > maxOutlierEject {
		return fmt.Errorf("outlier: invalid eject %v, want %v to %v", d, minOutlierTime, maxOutlierEject)
	}
	r := o.Rate
	if r == nil {
		return nil
	}
	r.Requests, r.Window = cmp.Or(r.Requests, 20), cmp.Or(r.Window, caddy.Duration(30*time.Second))
	if r.Percent < 1 || r.Percent > 100 {
		return fmt.Errorf("outlier: rate: invalid share %d, want 1 to 100 percent", r.Percent)
	}
	if r.Requests < 1 || r.Requests > maxOutlierRequests {
		return fmt.Errorf("outlier: rate: invalid number of requests %d, want 1 to %d", r.Requests, maxOutlierRequests)
	}
	if d := time.Duration(r.Window); d < minOutlierTime || d > maxOutlierWindow {
		return fmt.Errorf("outlier: rate: invalid window %v, want %v to %v", d, minOutlierTime, maxOutlierWindow)
	}
	return nil
}

// outlierOption is the option 'outlier [{ … }]'.
func outlierOption(to **Outlier) caddyblock.Option {
	return caddyblock.Option{Usage: "[{ <options> }]", Custom: func(d *caddyfile.Dispenser) error {
		if d.NextArg() {
			return caddyblock.ErrUsage
		}
		o := new(Outlier)
		*to = o
		return caddyblock.Block{What: "outlier", Options: caddyblock.Options{
			"errors":      caddyblock.Number(&o.Errors, 1, maxOutlierErrors),
			"rate":        outlierRate(&o.Rate),
			"eject":       caddyblock.Duration(&o.Eject),
			"max_ejected": caddyblock.Value("<percent>", &o.MaxEjected, percentage),
		}, Check: o.check}.Parse(d)
	}}
}

// outlierRate is the option 'rate <percent> [<requests> [<window>]]'.
func outlierRate(to **OutlierRate) caddyblock.Option {
	return caddyblock.Option{Usage: "<percent> [<requests> [<window>]]", Min: 1, Max: 3, Set: func(args []string) (err error) {
		r := new(OutlierRate)
		*to = r
		if r.Percent, err = percentage(args[0]); err != nil {
			return err
		}
		if len(args) > 1 {
			if err := caddyblock.Number(&r.Requests, 1, maxOutlierRequests).Set(args[1:2]); err != nil {
				return err
			}
		}
		if len(args) > 2 {
			return caddyblock.Duration(&r.Window).Set(args[2:])
		}
		return nil
	}}
}

// percentage reads a share.
func percentage(arg string) (int, error) {
	v, err := strconv.Atoi(strings.TrimSuffix(arg, "%"))
	if err != nil || v < 1 || v > 100 {
		return 0, fmt.Errorf("invalid percentage %q, want 1%% to 100%%", arg)
	}
	return v, nil
}

// detectors outlive every config, as the directories do.
var detectors = caddy.NewUsagePool() // backend.Key → *sharedDetector

// sharedDetector ejects nodes for as long as a source goes by it.
type sharedDetector struct {
	*outlier.Detector
	key       backend.Key
	directory *sharedDirectory
	running   background
}

// sourceOutliers are the ejections that a source goes by. It is told of the source's
// requests.
type sourceOutliers struct {
	*sharedDetector
	unsubscribe func()
}

// provisionOutliers has the nodes ejected whose requests fail.
func (u *Upstreams) provisionOutliers(ctx caddy.Context, b backend.Backend) error {
	var err error
	if u.outliers, err = u.acquireOutliers(b); err != nil {
		return fmt.Errorf("opening the detection of outliers: %w", err)
	}
	version := u.pickers.Version
	u.pickers.Version = func() uint64 { return version() + u.outliers.Version() }
	charge := func(took time.Duration) {
		u.directory.Charge(took)
		u.outliers.Charge(took)
	}
	u.pickers.Charge, u.routes.Charge = charge, charge
	u.builder.Ejected = u.outliers.Ejected
	u.builder.Back = u.outliers.Back
	return u.observe(ctx, u.outliers)
}

// acquireOutliers returns the detector of the source's nodes, not started unless another
// config did. Each call is matched by one of release.
func (u *Upstreams) acquireOutliers(b backend.Backend) (*sourceOutliers, error) {
	registry, err := backend.KeyOf(b)
	if err != nil {
		return nil, err
	}
	encoded, err := json.Marshal([]any{registry, u.Outlier, u.Service, u.Route, u.Where, u.Allow, u.Deny, u.builder.Scheme, u.https})
	if err != nil {
		return nil, fmt.Errorf("encoding the settings: %w", err)
	}
	key := backend.Key(sha256.Sum256(encoded))
	s, err := acquire(detectors, key, func() (*sharedDetector, error) {
		directory, err := acquireDirectory(b)
		if err != nil {
			return nil, err
		}
		options := u.Outlier.options()
		options.ByService, options.TLS = varies(u.Service) || u.Route, u.https
		options.Count = directory.stats.countEjection
		options.Logger = processLogger("discovery.outlier").With("registry", directory.name())
		return &sharedDetector{Detector: outlier.New(directory.Directory, options), key: key, directory: directory}, nil
	})
	if err != nil {
		return nil, err
	}
	return &sourceOutliers{s, s.Subscribe(func(e *discovery.Entry) bool { return u.builder.Fit(e, &u.static) })}, nil
}

// options returns the settings as the detector takes them.
func (o *Outlier) options() outlier.Options {
	options := outlier.Options{Errors: o.Errors, Eject: time.Duration(o.Eject), MaxEjected: o.MaxEjected, Now: traffic.Now}
	if r := o.Rate; r != nil {
		options.Percent, options.Requests, options.Window = r.Percent, r.Requests, time.Duration(r.Window)
	}
	return options
}

// reason says why the node is ejected, and for how long.
func (s *sourceOutliers) reason(e *discovery.Entry) string {
	x := s.Of(e)
	if x == nil {
		return string(picker.Ejected) // no more, as of just now
	}
	return fmt.Sprintf("%s until %s, %s: %s", picker.Ejected, x.Until.UTC().Format(time.RFC3339), x.Count(), x.Cause)
}

// start begins to let nodes in again. A config that is only validated never gets here.
func (s *sourceOutliers) start() { s.running.start(s.Run) }

// release ends the use of the detector by the source.
func (s *sourceOutliers) release() error {
	s.unsubscribe()
	_, err := detectors.Delete(s.key)
	return err
}

// Destruct ends the detector when no source uses it any more.
func (s *sharedDetector) Destruct() error {
	s.running.end()
	return s.directory.release()
}

// Sent implements traffic.Observer.
func (*sourceOutliers) Sent(*traffic.Exchange) {}

// Answered counts what is known by the header of a response already: that it failed, for
// the next request to go elsewhere, and what begins a connection that may last for days.
func (s *sourceOutliers) Answered(x *traffic.Exchange) {
	switch {
	case failsBy(x.Status):
		s.Failed(x.Node, x.SentAt, x.AnsweredAt, outlier.Failure(x.Status))
	case x.Unavailable:
		s.Failed(x.Node, x.SentAt, x.AnsweredAt, outlier.Unavailable)
	case x.Status == http.StatusSwitchingProtocols:
		s.Succeeded(x.Node, x.SentAt, x.AnsweredAt)
	}
}

// Done counts the rest.
func (s *sourceOutliers) Done(x *traffic.Exchange) {
	if failsBy(x.Status) || x.Unavailable || saysNothing(x.Status) || x.Status == http.StatusSwitchingProtocols {
		return
	}
	switch x.Outcome {
	case traffic.Answered:
		s.Succeeded(x.Node, x.SentAt, x.DoneAt)
	case traffic.NoConnection:
		s.Failed(x.Node, x.SentAt, x.DoneAt, outlier.NoConnection)
	case traffic.NoAnswer:
		s.Failed(x.Node, x.SentAt, x.DoneAt, outlier.NoAnswer)
	case traffic.BrokeOff:
		s.Failed(x.Node, x.SentAt, x.DoneAt, outlier.BrokeOff)
	case traffic.Aborted:
	}
}

// failsBy reports whether a response of the status is a failure of the node's.
func failsBy(status int) bool { return status >= 500 && status <= 599 && !saysNothing(status) }

// saysNothing reports whether a client can bring about a status at any node that works:
// by a method that it makes up, a version, or a header Via.
func saysNothing(status int) bool {
	return status == http.StatusNotImplemented || status == http.StatusHTTPVersionNotSupported || status == http.StatusLoopDetected
}

// Interface guards
var (
	_ traffic.Observer = (*sourceOutliers)(nil)
)
