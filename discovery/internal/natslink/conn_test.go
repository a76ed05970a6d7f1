package natslink_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is far more than anything here takes.
const patience = 30 * time.Second

// secret stands wherever a test puts a secret.
const secret = "s3cr3t-9f2c"

func open(t *testing.T, config natslink.Config) *natslink.Conn {
	t.Helper()
	conn, err := natslink.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func mustGet(t *testing.T, conn *natslink.Conn) *natslink.Link {
	t.Helper()
	link, err := conn.Get(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := link.Flush(); err != nil {
		t.Fatal(err)
	}
	return link
}

func await(t *testing.T, what string, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s has not happened after %v", what, patience)
	}
}

// wantError fails the test unless err is the sentinel, says the words, and
// keeps the secret.
func wantError(t *testing.T, err, sentinel error, words ...string) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Fatalf("error is %v, want one that wraps %q", err, sentinel)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error %q does not say %q", err, word)
		}
	}
	if strings.Contains(err.Error(), secret) {
		t.Errorf("error %q shows the secret", err)
	}
}

func TestLogin(t *testing.T) {
	t.Parallel()
	wrongSeed := natstest.Start(t, natstest.NKey()).Seed
	wrongCreds := natstest.Start(t, natstest.Operator()).Creds
	for name, test := range map[string]struct {
		option      natstest.Option
		right, bad  func(*natstest.Server) natslink.Config
		wantRefusal string
	}{
		"token": {
			option: natstest.Token(secret),
			right: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Token: secret}}
			},
			bad: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Token: secret + "x"}}
			},
		},
		"user": {
			option: natstest.Users(natstest.User{Name: "u", Password: secret}),
			right: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{User: "u", Password: secret}}
			},
			bad: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{User: "u", Password: secret + "x"}}
			},
		},
		"user info": {
			option: natstest.Users(natstest.User{Name: "u", Password: secret}),
			right: func(s *natstest.Server) natslink.Config {
				return natslink.Config{URLs: []string{s.URLWith(url.UserPassword("u", secret))}}
			},
			bad: func(s *natstest.Server) natslink.Config {
				return natslink.Config{URLs: []string{s.URLWith(url.UserPassword("u", secret+"x"))}}
			},
		},
		"nkey": {
			option: natstest.NKey(),
			right: func(s *natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{NKey: s.Seed}}
			},
			bad: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{NKey: wrongSeed}}
			},
		},
		"credentials": {
			option: natstest.Operator(),
			right: func(s *natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Credentials: s.Creds}}
			},
			bad: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Credentials: wrongCreds}}
			},
		},
		"no credentials": {
			option: natstest.Operator(),
			right: func(s *natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Credentials: s.Creds}}
			},
			bad: func(*natstest.Server) natslink.Config { return natslink.Config{} },
		},
		"mutual TLS": {
			option: natstest.MutualTLS(),
			right: func(s *natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{TLSCA: s.TLS.CA, TLSCert: s.TLS.ClientCert, TLSKey: s.TLS.ClientKey}}
			},
			bad: func(s *natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{TLSCA: s.TLS.CA}}
			},
			wantRefusal: "tls_client_auth",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := natstest.Start(t, test.option)
			config := func(make func(*natstest.Server) natslink.Config) natslink.Config {
				c := make(s)
				if c.URLs == nil {
					c.URLs = []string{s.URL()}
				}
				return c
			}
			mustGet(t, open(t, config(test.right)))
			_, err := open(t, config(test.bad)).Get(t.Context())
			wantError(t, err, discovery.ErrCredentials, s.Addr(), test.wantRefusal)
		})
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.TLS())
	plain := natstest.Start(t)
	stranger := certtest.New(t)

	mustGet(t, open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{TLSCA: s.TLS.CA}}))
	mustGet(t, open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{TLSCA: s.TLS.CA, TLSServerName: "registry.test"}}))

	for name, test := range map[string]struct {
		config natslink.Config
		want   string
	}{
		"unknown authority": {natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{TLSCA: stranger.CA}}, "tls_ca"},
		"no authority":      {natslink.Config{URLs: []string{"nats://" + s.Addr()}}, "tls_ca"},
		"another name":      {natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{TLSCA: s.TLS.CA, TLSServerName: "other.test"}}, "tls_server_name"},
		"no TLS there":      {natslink.Config{URLs: []string{plain.URL()}, Options: natsconn.Options{TLSCA: s.TLS.CA}}, "does not offer TLS"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := open(t, test.config).Get(t.Context())
			wantError(t, err, discovery.ErrUnreachable, test.want)
		})
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Operator())
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage")
	if err := os.WriteFile(garbage, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(dir, "missing")
	for name, options := range map[string]natsconn.Options{
		"credentials": {Credentials: garbage},
		"nkey":        {NKey: garbage},
		"authority":   {TLSCA: garbage},
		"certificate": {TLSCert: garbage, TLSKey: garbage},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := natslink.Config{URLs: []string{s.URL()}, Options: options}
			_, err := open(t, config).Get(t.Context())
			wantError(t, err, discovery.ErrInvalid, garbage)
			for _, field := range []*string{&config.Credentials, &config.NKey, &config.TLSCA, &config.TLSCert, &config.TLSKey} {
				if *field != "" {
					*field = missing
				}
			}
			_, err = open(t, config).Get(t.Context())
			wantError(t, err, fs.ErrNotExist, missing)
			wantError(t, err, discovery.ErrInvalid)
		})
	}
	t.Run("written later", func(t *testing.T) {
		t.Parallel()
		late := filepath.Join(dir, "late.creds")
		conn := open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{Credentials: late}})
		_, err := conn.Get(t.Context())
		wantError(t, err, fs.ErrNotExist, late)
		data, err := os.ReadFile(s.Creds)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(late, data, 0o600); err != nil {
			t.Fatal(err)
		}
		mustGet(t, conn)
	})
}

func TestNobodyThere(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	s.Stop()
	_, err := open(t, natslink.Config{URLs: []string{s.URLWith(url.UserPassword("u", secret))}}).Get(t.Context())
	wantError(t, err, discovery.ErrUnreachable, s.Addr(), "connection refused")
}

func TestFirstServerDead(t *testing.T) {
	t.Parallel()
	dead, live := natstest.Start(t), natstest.Start(t)
	dead.Stop()
	conn := open(t, natslink.Config{URLs: []string{dead.URL(), live.URL()}})
	if got := mustGet(t, conn).Address(); got != live.URL() {
		t.Errorf("connected to %s, want %s", got, live.URL())
	}
}

// A refusal says more than silence, whichever server comes last.
func TestRefusedByOneAndDeadOther(t *testing.T) {
	t.Parallel()
	dead, live := natstest.Start(t), natstest.Start(t, natstest.Token(secret))
	dead.Stop()
	for _, urls := range [][]string{{dead.URL(), live.URL()}, {live.URL(), dead.URL()}} {
		_, err := open(t, natslink.Config{URLs: urls}).Get(t.Context())
		wantError(t, err, discovery.ErrCredentials, dead.Addr(), live.Addr(), "connection refused")
	}
}

func TestOneConnectionForAll(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	conn := open(t, natslink.Config{URLs: []string{s.URL()}})
	links := make([]*natslink.Link, 20)
	var group sync.WaitGroup
	for i := range links {
		group.Go(func() { links[i], _ = conn.Get(t.Context()) })
	}
	group.Wait()
	for _, link := range links {
		if link == nil || link != links[0] {
			t.Fatal("two calls of Get returned different connections")
		}
	}
	if n := s.NumClients(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

func TestLostAndDialledAnew(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	conn := open(t, natslink.Config{URLs: []string{s.URL()}})
	link := mustGet(t, conn)
	guarded, cancel := link.Guard(t.Context(), func(natslink.Operation, string) bool { return false })
	defer cancel()
	if err := link.Err(); err != nil {
		t.Errorf("Err of a connection that stands = %v", err)
	}

	s.Stop()
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrUnreachable, s.Addr())
	await(t, "the end of the guarded context", guarded.Done())
	wantError(t, context.Cause(guarded), discovery.ErrUnreachable, s.Addr())
	late, cancel := link.Guard(t.Context(), func(natslink.Operation, string) bool { return false })
	defer cancel()
	wantError(t, context.Cause(late), discovery.ErrUnreachable)
	_, err := conn.Get(t.Context())
	wantError(t, err, discovery.ErrUnreachable)

	s.Restart()
	if next := mustGet(t, conn); next == link {
		t.Error("Get returned the connection that was lost")
	}
}

func TestDiscoveredServers(t *testing.T) {
	t.Parallel()
	one := natstest.Start(t, natstest.NoJetStream(), natstest.Cluster("one"))
	two := natstest.Start(t, natstest.NoJetStream(), natstest.Cluster("two", one))
	conn := open(t, natslink.Config{URLs: []string{one.URL()}})
	link := mustGet(t, conn)
	deadline := time.Now().Add(patience)
	for len(link.DiscoveredServers()) == 0 {
		if time.Now().After(deadline) {
			t.Fatal("the cluster has not told of its second server")
		}
		if err := link.Flush(); err != nil { // a round trip
			t.Fatal(err)
		}
	}
	one.Stop()
	await(t, "the loss of the connection", link.Lost())
	for {
		// The address is remembered by a callback, a moment after the client
		// has it.
		next, err := conn.Get(t.Context())
		if err == nil {
			if got := next.Address(); got != two.URL() {
				t.Errorf("connected to %s, want %s", got, two.URL())
			}
			if got := conn.Located(); !slices.Contains(got, two.Addr()) {
				t.Errorf("located at %q, want %s among them", got, two.Addr())
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// silent returns the address of a server that accepts and says nothing.
func silent(t *testing.T) (address string, accepted <-chan struct{}) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	calls := make(chan struct{}, 10)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			calls <- struct{}{}
		}
	}()
	t.Cleanup(func() { listener.Close(); <-done })
	return listener.Addr().String(), calls
}

func TestSilentServer(t *testing.T) {
	t.Parallel()
	address, _ := silent(t)
	_, err := open(t, natslink.Config{URLs: []string{"nats://" + address}}).Get(t.Context())
	wantError(t, err, discovery.ErrUnreachable, address, "does not answer")
}

func TestGetEndsWithContext(t *testing.T) {
	t.Parallel()
	address, accepted := silent(t)
	conn := open(t, natslink.Config{URLs: []string{"nats://" + address}})
	ctx, cancel := context.WithCancel(t.Context())
	results := make(chan error)
	for range 2 { // one dials, the other waits for its turn
		go func() {
			_, err := conn.Get(ctx)
			results <- err
		}()
	}
	await(t, "the dialling", accepted)
	cancel()
	for range 2 {
		if err := <-results; !errors.Is(err, context.Canceled) {
			t.Errorf("Get returned %v, want the context's error", err)
		}
	}
	expired, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
	defer cancel()
	if _, err := conn.Get(expired); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Get returned %v, want the context's error", err)
	}
}

func TestCloseEndsGet(t *testing.T) {
	t.Parallel()
	address, accepted := silent(t)
	conn := open(t, natslink.Config{URLs: []string{"nats://" + address}})
	results := make(chan error)
	for range 2 {
		go func() {
			_, err := conn.Get(t.Context())
			results <- err
		}()
	}
	await(t, "the dialling", accepted)
	conn.Close()
	for range 2 {
		wantError(t, <-results, discovery.ErrUnreachable, "closed")
	}
	_, err := conn.Get(t.Context())
	wantError(t, err, discovery.ErrUnreachable, "closed")
	if err := conn.Close(); err != nil {
		t.Errorf("the second Close: %v", err)
	}
}

func TestGuardEndsWhatIsDenied(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{Name: "u", Password: secret, Publish: natstest.Deny("orders.>")}))
	conn := open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{User: "u", Password: secret}})
	link := mustGet(t, conn)
	orders, cancel := link.Guard(t.Context(), func(_ natslink.Operation, subject string) bool { return strings.HasPrefix(subject, "orders.") })
	defer cancel()
	others, cancel := link.Guard(t.Context(), func(_ natslink.Operation, subject string) bool { return strings.HasPrefix(subject, "others.") })
	defer cancel()
	if err := link.Publish("orders.new", nil); err != nil {
		t.Fatal(err)
	}
	await(t, "the end of the guarded context", orders.Done())
	wantError(t, context.Cause(orders), discovery.ErrPermission, "publish", "orders.new")
	wantError(t, link.Denied(), discovery.ErrPermission, "orders.new")
	if err := context.Cause(others); err != nil {
		t.Errorf("an operation that was not concerned ended with %v", err)
	}
	if err := link.Err(); err != nil {
		t.Errorf("the connection ended with %v", err)
	}
}

// Without the right to hear answers nothing works on a connection.
func TestAnswersDenied(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{Name: "u", Password: secret, Subscribe: natstest.Deny("_INBOX.>")}))
	conn := open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{User: "u", Password: secret}})
	link := mustGet(t, conn)
	if _, err := link.RequestWithContext(t.Context(), "anything", nil); err == nil {
		t.Error("a request succeeded")
	}
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrPermission, "subscribe", "_INBOX")
}

// An answer that may not be sent, and an inbox of somebody's own, are no reason
// to give up the connection.
func TestOneInboxDenied(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{
		Name: "u", Password: secret, Publish: natstest.Deny("_INBOX.>"), Subscribe: natstest.Deny("_INBOX.>"),
	}))
	link := mustGet(t, open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{User: "u", Password: secret}}))
	inbox := link.NewInbox()
	for _, operation := range []natslink.Operation{natslink.Publish, natslink.Subscribe} {
		concerned := func(want natslink.Operation) func(natslink.Operation, string) bool {
			return func(o natslink.Operation, subject string) bool { return o == want && subject == inbox }
		}
		guarded, release := link.Guard(t.Context(), concerned(operation))
		other, releaseOther := link.Guard(t.Context(), concerned("neither"))
		if operation == natslink.Publish {
			if err := link.Publish(inbox, nil); err != nil {
				t.Fatal(err)
			}
		} else if _, err := link.SubscribeSync(inbox); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		if err := link.Confirm(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
		wantError(t, context.Cause(guarded), discovery.ErrPermission, string(operation), inbox)
		if err := context.Cause(other); err != nil {
			t.Errorf("an operation that was not concerned ended with %v", err)
		}
		release()
		releaseOther()
	}
	if err := link.Err(); err != nil {
		t.Errorf("the connection ended with %v", err)
	}
}

// Whoever confirms knows of every refusal that came before, also where others
// are refused something at the same time.
func TestConfirmWaitsForRefusals(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{Name: "u", Password: secret, Publish: natstest.Deny("orders.>")}))
	link := mustGet(t, open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{User: "u", Password: secret}}))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			subject := fmt.Sprintf("orders.%d", i)
			for range 100 {
				guarded, release := link.Guard(ctx, func(_ natslink.Operation, s string) bool { return s == subject })
				if err := link.Publish(subject, nil); err != nil {
					t.Error(err)
				}
				if err := link.Confirm(ctx); err != nil {
					t.Error(err)
				}
				if err := context.Cause(guarded); !errors.Is(err, discovery.ErrPermission) {
					t.Errorf("after Confirm the guard of %s says %v", subject, err)
				}
				release()
			}
		})
	}
	group.Wait()
	if err := link.Confirm(ctx); err != nil {
		t.Errorf("with nothing new: %v", err)
	}
	ended, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	if err := link.Confirm(ended); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("with an ended context: %v", err)
	}
	if link.Err() != nil {
		t.Errorf("Confirm dropped the link: %v", link.Err())
	}
}

func TestCredentialsExpire(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.OperatorUntil(time.Now().Add(3*time.Second)))
	conn := open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{Credentials: s.Creds}})
	link := mustGet(t, conn)
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrCredentials, "expired")
	// Within the very second of the expiry the server lets them in once more.
	deadline := time.Now().Add(patience)
	for {
		_, err := conn.Get(t.Context())
		if err != nil {
			wantError(t, err, discovery.ErrCredentials)
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the expired credentials are still accepted")
		}
	}
}

func TestProbe(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	proxy := natstest.NewProxy(t, s.Addr())
	conn := open(t, natslink.Config{URLs: []string{"nats://" + proxy.Addr()}})
	link := mustGet(t, conn)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := link.Probe(ctx); err != nil {
		t.Errorf("Probe of a live server: %v", err)
	}
	proxy.Freeze()
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	wantError(t, link.Probe(short), discovery.ErrUnreachable, proxy.Addr())
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrUnreachable, "does not answer")
}

// Nobody asks anything, and still a dead connection is noticed.
func TestSilenceIsNoticed(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	proxy := natstest.NewProxy(t, s.Addr())
	link := mustGet(t, open(t, natslink.Config{URLs: []string{"nats://" + proxy.Addr()}}))
	proxy.Freeze()
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrUnreachable, "stopped answering")
}

func TestValidate(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		config natslink.Config
		want   string // "" if it is valid
	}{
		"nothing":            {natslink.Config{}, ""},
		"every scheme":       {natslink.Config{URLs: []string{"nats://a", "tls://b:1", "ws://c", "wss://[::1]", "NATS://d/"}}, ""},
		"one login":          {natslink.Config{Options: natsconn.Options{Token: secret}}, ""},
		"two logins":         {natslink.Config{Options: natsconn.Options{Token: secret, User: "u", Password: secret}}, "token and user"},
		"login in URL too":   {natslink.Config{URLs: []string{"nats://u:" + secret + "@a"}, Options: natsconn.Options{NKey: "f"}}, "nkey and user info"},
		"password alone":     {natslink.Config{Options: natsconn.Options{Password: secret}}, "without a user"},
		"certificate alone":  {natslink.Config{Options: natsconn.Options{TLSCert: "c"}}, "key"},
		"key alone":          {natslink.Config{Options: natsconn.Options{TLSKey: "k"}}, "certificate"},
		"empty":              {natslink.Config{URLs: []string{""}}, "nats://host:port"},
		"bare":               {natslink.Config{URLs: []string{"a:4222"}}, "nats://host:port"},
		"bare with password": {natslink.Config{URLs: []string{"u:" + secret + "@a:4222"}}, `"…@a:4222"`},
		"other scheme":       {natslink.Config{URLs: []string{"http://u:" + secret + "@a:4222"}}, "nats, tls, ws or wss"},
		"no host":            {natslink.Config{URLs: []string{"nats://:4222"}}, "host is missing"},
		"colon in the host":  {natslink.Config{URLs: []string{"nats://a:1:4222"}}, "no IPv6 address"},
		"port range":         {natslink.Config{URLs: []string{"nats://a:70000"}}, "65535"},
		"port zero":          {natslink.Config{URLs: []string{"nats://a:0"}}, "65535"},
		"odd password":       {natslink.Config{URLs: []string{"nats://u:" + secret + "/@a:4222"}}, "percent-encoded"},
		"odd password 2":     {natslink.Config{URLs: []string{"nats://u:%zz" + secret + "@a:4222"}}, "percent-encoded"},
		"path":               {natslink.Config{URLs: []string{"nats://u:" + secret + "@a:4222/b"}}, "path"},
		"query":              {natslink.Config{URLs: []string{"nats://a:4222?token=" + secret}}, "query"},
		"list":               {natslink.Config{URLs: []string{"nats://a:4222,nats://b:4222"}}, "URL of its own"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := test.config.Validate()
			if test.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantError(t, err, discovery.ErrInvalid, test.want)
			if _, err := natslink.New(test.config); err == nil {
				t.Error("New accepted what Validate refused")
			}
		})
	}
}

func TestNothingPrintsSecrets(t *testing.T) {
	t.Parallel()
	config := natslink.Config{URLs: []string{"nats://" + secret + "@a", "nats://u:" + secret + "@b:1"}, Options: natsconn.Options{Token: secret, User: "u", Password: secret}}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if got, want := fmt.Sprintf(verb, config), "a:4222,b:1"; got != want {
			t.Errorf("%s prints %q, want %q", verb, got, want)
		}
	}
}

func FuzzParseURL(f *testing.F) {
	f.Add("nats://", "u:", "", "@a:4222/b")
	f.Add("nats://", "u:", "/", "@a")
	f.Add("ws://", "", "", "@[::1]")
	f.Add("", "", "?", "@a")
	f.Fuzz(func(t *testing.T, scheme, before, after, rest string) {
		raw := scheme + before + secret + after + "@" + rest
		if strings.Contains(scheme+rest, secret) {
			return // the secret stands where none belongs
		}
		u, err := natslink.ParseURL(raw)
		if err != nil {
			wantError(t, err, discovery.ErrInvalid)
			return
		}
		if u.Hostname() == "" || u.Port() == "" {
			t.Errorf("ParseURL(%q) = %q without a host or a port", raw, u)
		}
		again, err := natslink.ParseURL(u.String())
		if err != nil || again.Host != u.Host {
			t.Errorf("ParseURL(%q) = %v, %v, want %q again", u, again, err, u)
		}
	})
}
