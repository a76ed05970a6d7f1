package embedded

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"path/filepath"

	"github.com/caddyserver/caddy/v2"
	"github.com/gofrs/flock"
	"github.com/nats-io/nats-server/v2/server"
	"go.uber.org/zap"
)

// How long a server may take to come up or to go down before it counts as
// broken. Both are done within milliseconds; a large store that was not closed
// properly is what takes its time.
const (
	startTimeout = 30 * time.Second
	stopTimeout  = 10 * time.Second
)

// settings are the whole configuration of a server, resolved. Equal settings
// mean the same server, so they are its key in the pool; they hold secrets and
// are never printed.
type settings struct {
	listen, host     string
	port             int // host and port are those of listen
	store            string
	maxStore         int64
	user, password   string
	certificate, key string
}

// clashes reports whether two servers cannot run at the same time. Equal ports
// on different addresses could, but since one of the two is about to go anyway,
// finding out is not worth the while.
func (s settings) clashes(other settings) bool {
	return s.port == other.port || s.store == other.store
}

// An instance is a server, running or displaced. It is shared by all the
// configurations that want exactly its settings, and refers to none of them.
//
// Caddy starts a new configuration before it stops the old one, and goes on
// with the old one if the new one fails. Two servers cannot share an address or
// a store, though, so an instance that starts displaces those it clashes with:
// they stop, but stay in the pool for as long as their configuration lives. If
// that outlives the instance that displaced them, they run again.
type instance struct {
	settings
	// age orders instances; the newer one has precedence.
	age uint64
	// certificate is what new connections are served with.
	certificate atomic.Pointer[tls.Certificate]

	// Guarded by lifecycle. Both are nil while the instance does not run.
	server *server.Server
	lock   *flock.Flock
}

var (
	pool = caddy.NewUsagePool() // settings → *instance

	// lifecycle is held while servers start and stop, so that the decision who may
	// run and its execution are one step. Only the loading and unloading of
	// configurations ever wait for it. It is locked before the pool's own lock,
	// never after.
	lifecycle sync.Mutex
	ages      atomic.Uint64
)

// acquire returns the running server of these settings and counts the caller
// among its users. Each success must be followed by one release.
func acquire(s settings, certificate *tls.Certificate) (*instance, error) {
	v, _, err := pool.LoadOrNew(s, func() (caddy.Destructor, error) {
		return &instance{settings: s, age: ages.Add(1)}, nil
	})
	if err != nil {
		return nil, err
	}
	in := v.(*instance)
	in.certificate.Store(certificate)
	if err := in.start(); err != nil {
		return nil, errors.Join(err, release(s))
	}
	return in, nil
}

// release gives back what acquire returned. The last one out stops the server.
func release(s settings) error {
	_, err := pool.Delete(s)
	return err
}

// start makes the instance run and displaces whatever it clashes with.
func (in *instance) start() error {
	lifecycle.Lock()
	defer lifecycle.Unlock()
	if in.server != nil {
		return nil
	}
	for _, other := range instances() {
		if other.server != nil && other.clashes(in.settings) {
			if err := other.halt(); err != nil {
				return err
			}
		}
	}
	return in.boot()
}

// Destruct stops the instance and lets those run again that it displaced. The
// pool calls it when it has already forgotten the instance.
func (in *instance) Destruct() error {
	lifecycle.Lock()
	defer lifecycle.Unlock()
	errs := []error{in.halt()}
	all := instances()
	for _, other := range all {
		if other.server != nil || slices.ContainsFunc(all, func(o *instance) bool {
			return o.server != nil && o.clashes(other.settings)
		}) {
			continue
		}
		if err := other.boot(); err != nil {
			errs = append(errs, fmt.Errorf("bringing the previous NATS server back: %w", err))
		}
	}
	return errors.Join(errs...)
}

// instances returns what is in the pool, newest first.
func instances() []*instance {
	var all []*instance
	pool.Range(func(_, v any) bool {
		all = append(all, v.(*instance))
		return true
	})
	slices.SortFunc(all, func(a, b *instance) int { return cmp.Compare(b.age, a.age) })
	return all
}

// boot starts the server and returns when it accepts connections. The caller
// holds lifecycle.
func (in *instance) boot() (err error) {
	if err := os.MkdirAll(in.store, 0o700); err != nil {
		return fmt.Errorf("store %s cannot be created: %w", in.store, err)
	}
	lock, err := lockStore(in.store)
	if err != nil {
		return err
	}
	// The server reports a taken port only in its log, in prose. Asking first
	// gives an error that names the address, and one that callers can match.
	probe, err := net.Listen("tcp", in.listen)
	if err == nil {
		err = probe.Close()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("listen address %s: %w", in.listen, err), lock.Close())
	}

	opts := in.options()
	srv, err := server.NewServer(opts)
	if err != nil {
		return errors.Join(fmt.Errorf("setting up the NATS server: %w", err), lock.Close())
	}
	began := time.Now()
	log := new(logger)
	srv.SetLoggerV2(log, false, false, false)
	in.server, in.lock = srv, lock

	srv.Start()
	if fatal := log.firstFatal(); fatal != "" {
		return errors.Join(fmt.Errorf("starting the NATS server at %s with store %s: %s", in.listen, in.store, fatal), in.halt())
	}
	if !srv.ReadyForConnections(startTimeout) {
		return errors.Join(fmt.Errorf("the NATS server at %s accepted no connection within %v", in.listen, startTimeout), in.halt())
	}
	log.started()
	zapLogger().Info("NATS server is up",
		zap.String("listen", in.listen),
		zap.String("store", in.store),
		zap.Int64("max_store", in.maxStore),
		zap.Bool("user", in.user != ""),
		zap.Bool("tls", opts.TLSConfig != nil),
		zap.Duration("took", time.Since(began)))
	return nil
}

// halt stops the server, if it runs, and returns when nothing is left of it.
// The caller holds lifecycle.
func (in *instance) halt() error {
	srv, lock := in.server, in.lock
	if srv == nil {
		return nil
	}
	in.server, in.lock = nil, nil
	down := make(chan struct{})
	go func() {
		defer close(down)
		srv.Shutdown()
		srv.WaitForShutdown()
	}()
	timeout := time.NewTimer(stopTimeout)
	defer timeout.Stop()
	select {
	case <-down:
		return lock.Close()
	case <-timeout.C:
		// The store stays locked: somebody may still be writing to it.
		return fmt.Errorf("the NATS server at %s did not stop within %v", in.listen, stopTimeout)
	}
}

// options translates the settings.
func (in *instance) options() *server.Options {
	opts := &server.Options{
		ServerName:             "caddy",
		Host:                   in.host,
		Port:                   in.port,
		JetStream:              true,
		StoreDir:               in.store,
		JetStreamMaxStore:      in.maxStore,
		JetStreamMaxMemory:     in.maxStore, // the server would take three quarters of the machine
		DisableJetStreamBanner: true,
		Username:               in.user,
		Password:               in.password,
		NoSigs:                 true, // signals are Caddy's
	}
	if in.certificate.Load() != nil {
		opts.TLSConfig = &tls.Config{
			MinVersion: tls.VersionTLS12,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
				return in.certificate.Load(), nil
			},
		}
	}
	return opts
}

// lockStore makes sure that no other process uses the store, which the server
// itself does not: two servers on one store destroy it. Closing gives the lock
// back; so does the end of the process, however it comes. On a system without
// locks the listen address, which two servers cannot share either, has to do.
func lockStore(store string) (*flock.Flock, error) {
	lock := flock.New(filepath.Join(store, "caddy.lock"), flock.SetFlag(os.O_RDWR|os.O_CREATE), flock.SetPermissions(0o600))
	locked, err := lock.TryLock()
	switch {
	case errors.Is(err, errors.ErrUnsupported), locked:
		return lock, nil
	case err != nil:
		return nil, fmt.Errorf("locking store %s: %w", store, err)
	}
	return nil, fmt.Errorf("store %s is in use by another process: give each Caddy a store of its own, or stop the other one", store)
}
