// Package natslink holds the connection that both NATS backends share: one
// *nats.Conn, dialled when it is first needed and dialled anew when it broke.
//
// It never reconnects by itself. The client library can, and then goes on as if
// nothing had happened: subscriptions come back late and consumers that were
// lost in between stay silent. Here a broken connection ends whatever was built
// on it, at once and with the reason, and the callers that retry anyway (the
// directory and the registrar) ask for the next one.
package natslink

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

const (
	// dialTimeout is for one server: once to connect, once to be let in.
	dialTimeout = 2 * time.Second
	// A dead server that says nothing is noticed after three pings.
	pingInterval = 2 * time.Second
	maxPingsOut  = 2
	// flushTimeout bounds a write into a connection that takes nothing more.
	flushTimeout = 5 * time.Second
	// roundTrip is how long a server may take to answer a ping, and lastRoundTrip
	// how long a second one, before the connection counts as dead.
	roundTrip     = 2 * time.Second
	lastRoundTrip = time.Second
	// syncQueue is how many messages may wait in a subscription that is read by
	// calls. The client's own default takes half a megabyte for each.
	syncQueue = 1024
	// maxDiscovered bounds what a server may add to the list of addresses.
	maxDiscovered = 64
)

// A Conn is a connection to one NATS cluster. It is dialled by the first Get,
// and by every Get that finds it broken. All methods may be called
// concurrently.
type Conn struct {
	config    Config
	addresses []address // as configured

	// dialing is held by the one caller that dials. It is a channel and not a
	// mutex, so that the others wait no longer than their contexts.
	dialing chan struct{}
	closed  chan struct{} // closed by Close, under mu

	mu         sync.Mutex         // guards what follows; no I/O happens under it
	link       *Link              // the last one, which may be lost; nil at first
	discovered []address          // what the cluster told of itself
	abort      context.CancelFunc // ends the dialling that is under way
}

// New returns a connection that is not dialled yet. The error wraps
// [discovery.ErrInvalid]: the configuration contradicts itself, or a URL cannot be
// read.
func New(config Config) (*Conn, error) {
	addresses, err := config.addresses()
	if err != nil {
		return nil, err
	}
	return &Conn{
		config:    config,
		addresses: addresses,
		dialing:   make(chan struct{}, 1),
		closed:    make(chan struct{}),
	}, nil
}

// String names the servers, and no secret.
func (c *Conn) String() string { return c.config.String() }

// Get returns the connection as it stands, or dials: one caller at a time, one
// server after the other, in an order that is drawn anew each time, two seconds
// each at most. It fails with [discovery.ErrUnreachable] if nobody answers,
// [discovery.ErrCredentials] if somebody answers and does not let us in,
// [discovery.ErrInvalid] if a file cannot be used, and with the context's error
// once that has ended.
func (c *Conn) Get(ctx context.Context) (*Link, error) {
	if link, err := c.current(); link != nil || err != nil {
		return link, err
	}
	select {
	case c.dialing <- struct{}{}:
		defer func() { <-c.dialing }()
	case <-ctx.Done():
		return nil, fmt.Errorf("connecting to NATS at %s: %w", c, ctx.Err())
	case <-c.closed:
		return nil, errClosed
	}
	// Somebody else may have dialled while we waited.
	if link, err := c.current(); link != nil || err != nil {
		return link, err
	}

	abortable, abort := context.WithCancel(ctx)
	defer abort()
	c.mu.Lock()
	c.abort = abort
	candidates := append(slices.Clone(c.addresses), c.discovered...)
	c.mu.Unlock()
	if c.isClosed() {
		return nil, errClosed // it may have come before there was anything to abort
	}
	link, err := c.dialAny(abortable, candidates)
	return c.dialled(ctx, link, err)
}

// dialled takes up the outcome of dialling.
func (c *Conn) dialled(ctx context.Context, link *Link, err error) (*Link, error) {
	c.mu.Lock()
	c.abort = nil
	closed := c.isClosed()
	if link != nil && !closed {
		c.link = link
	}
	c.mu.Unlock()
	switch {
	case closed:
		if link != nil {
			link.Conn.Close()
		}
		return nil, errClosed
	case err != nil && ctx.Err() != nil:
		err = fmt.Errorf("connecting to NATS at %s: %w", c, ctx.Err())
		if errors.Is(err, context.DeadlineExceeded) {
			// Whoever gives up after a time wants to know what that means.
			err = fmt.Errorf("%w: %w", discovery.ErrUnreachable, err)
		}
		return nil, err
	case err != nil:
		return nil, err
	}
	c.noteServers(link, link.Conn)
	return link, nil
}

// Close closes the connection, ends what waits for it, and lets no Get succeed
// any more. It returns when the connection is closed; closing again does
// nothing.
func (c *Conn) Close() error {
	c.mu.Lock()
	if c.isClosed() {
		c.mu.Unlock()
		return nil
	}
	close(c.closed)
	link, abort := c.link, c.abort
	c.mu.Unlock()
	if abort != nil {
		abort()
	}
	if link != nil {
		link.drop(errClosed)
		<-link.Lost()
	}
	return nil
}

var errClosed = fmt.Errorf("%w: the connection was closed", discovery.ErrUnreachable)

func (c *Conn) isClosed() bool {
	select {
	case <-c.closed:
		return true
	default:
		return false
	}
}

// current returns the link if it stands, an error if there will be no more.
func (c *Conn) current() (*Link, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isClosed() {
		return nil, errClosed
	}
	// IsClosed turns true a moment before Lost is told.
	if c.link == nil || c.link.Conn.IsClosed() {
		return nil, nil
	}
	return c.link, nil
}

// noteServers keeps the servers that the cluster has told of, so that we still
// find it when those that were configured are gone.
func (c *Conn) noteServers(link *Link, nc *nats.Conn) {
	known := make(map[string]bool)
	for _, a := range c.addresses {
		known[a.url.Host] = true
	}
	var discovered []address
	for _, raw := range nc.DiscoveredServers() {
		u, err := url.Parse(raw)
		if err != nil || u.Hostname() == "" || known[u.Host] || len(discovered) == maxDiscovered {
			continue
		}
		known[u.Host] = true
		// What lets us in there is what let us in here, as it is for a client
		// that reconnects by itself.
		a := address{url: url.URL{Scheme: u.Scheme, Host: u.Host, User: link.address.url.User}}
		if nc.TLSRequired() && net.ParseIP(u.Hostname()) != nil {
			a.tlsName = link.address.tlsName
			if host := link.address.url.Hostname(); a.tlsName == "" && net.ParseIP(host) == nil {
				a.tlsName = host
			}
		}
		discovered = append(discovered, a)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(discovered) > 0 {
		c.discovered = discovered
	}
}

// Located returns the servers that the cluster has told of, as host:port, sorted.
func (c *Conn) Located() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var addresses []string
	for _, a := range c.discovered {
		host := a.url.Host
		if a.url.Port() == "" {
			host = net.JoinHostPort(a.url.Hostname(), strconv.Itoa(nats.DefaultPort))
		}
		addresses = append(addresses, host)
	}
	slices.Sort(addresses)
	return addresses
}

// dialAny dials until a server lets us in.
func (c *Conn) dialAny(ctx context.Context, candidates []address) (*Link, error) {
	// Those configured come first: what a cluster tells of itself may be an
	// address that only its own network knows.
	shuffle(candidates[:len(c.addresses)])
	shuffle(candidates[len(c.addresses):])

	var (
		sentinel = discovery.ErrUnreachable
		failures []string
		causes   []error
	)
	for _, a := range candidates {
		link, err := c.dial(ctx, a)
		if err == nil {
			return link, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if errors.Is(err, discovery.ErrInvalid) {
			return nil, err // a file of ours: the next server will not mend it
		}
		text, kind := describe(err)
		if kind == discovery.ErrCredentials {
			// Somebody is there, which says more than that others are not.
			sentinel = discovery.ErrCredentials
		}
		failures = append(failures, a.String()+": "+text)
		causes = append(causes, err)
	}
	return nil, &dialError{
		text:   fmt.Sprintf("%v: %s", sentinel, strings.Join(failures, "; ")),
		causes: append([]error{sentinel}, causes...),
	}
}

// dialError keeps what errors.Is needs beside a text that is our own: those of
// the libraries repeat the address and do not say what would help.
type dialError struct {
	text   string
	causes []error
}

func (e *dialError) Error() string   { return e.text }
func (e *dialError) Unwrap() []error { return e.causes }

func shuffle(addresses []address) {
	rand.Shuffle(len(addresses), func(i, j int) {
		addresses[i], addresses[j] = addresses[j], addresses[i]
	})
}

// dial connects to one server.
func (c *Conn) dial(ctx context.Context, a address) (*Link, error) {
	login, err := c.config.login()
	if err != nil {
		return nil, err
	}
	tlsConfig, err := c.config.tls(a)
	if err != nil {
		return nil, err
	}
	link := newLink(a, c.config.inboxes())
	dialer := &dialer{ctx: ctx}
	defer dialer.release()
	options := []nats.Option{
		nats.Name(c.config.Name),
		nats.NoReconnect(),
		nats.Timeout(dialTimeout),
		nats.PingInterval(pingInterval),
		nats.MaxPingsOutstanding(maxPingsOut),
		nats.FlusherTimeout(flushTimeout),
		nats.SyncQueueLen(syncQueue),
		nats.SetCustomDialer(dialer),
		// The dialer resolves the name itself, and ends with the context.
		nats.SkipHostLookup(),
		nats.ErrorHandler(link.onError),
		nats.ClosedHandler(link.onClosed),
		nats.DiscoveredServersHandler(func(nc *nats.Conn) { c.noteServers(link, nc) }),
	}
	if c.config.InboxPrefix != "" {
		options = append(options, nats.CustomInboxPrefix(c.config.InboxPrefix))
	}
	if c.config.TLSHandshakeFirst {
		options = append(options, nats.TLSHandshakeFirst())
	}
	if tlsConfig != nil {
		options = append(options, nats.Secure(tlsConfig))
	}
	nc, err := nats.Connect(a.url.String(), append(options, login...)...)
	if err == nil && !dialer.release() {
		nc.Close() // the context ended at the very end
		err = context.Cause(ctx)
	}
	if err != nil {
		if dialer.err != nil {
			// The client says of a refused connection only that there are no
			// servers.
			return nil, dialer.err
		}
		return nil, explainHandshake(err, c.config.TLSHandshakeFirst, tlsConfig != nil)
	}
	link.attach(nc)
	return link, nil
}

var (
	errServerWaits  = errors.New("the server waits")
	errServerSpeaks = errors.New("the server speaks")
)

// explainHandshake adds to an error that the two sides may not agree on who speaks
// first.
func explainHandshake(err error, handshakeFirst, secured bool) error {
	var record tls.RecordHeaderError
	switch {
	case handshakeFirst && errors.As(err, &record):
		return fmt.Errorf("%w: %w", errServerSpeaks, err)
	case !handshakeFirst && secured && isTimeout(err):
		return fmt.Errorf("%w: %w", errServerWaits, err)
	}
	return err
}

// A dialer ends both the dialling and the handshake that follows it when its
// context ends. It serves one call of nats.Connect, whose interfaces know no
// context, and lives no longer.
type dialer struct {
	ctx  context.Context //nolint:containedctx // nats.CustomDialer knows no context
	err  error
	stop func() bool
}

// Dial implements nats.CustomDialer.
func (d *dialer) Dial(network, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(d.ctx, network, address)
	if err != nil {
		d.err = err
		return nil, err
	}
	d.stop = context.AfterFunc(d.ctx, func() { conn.Close() })
	return conn, nil
}

// release lets the connection outlive the context, and reports false if the
// context has closed it already.
func (d *dialer) release() bool {
	if d.stop == nil {
		return true
	}
	stopped := d.stop()
	d.stop = nil
	return stopped
}
