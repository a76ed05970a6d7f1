package redis

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// TestErrors holds what real servers answer against the sentinels.
func TestErrors(t *testing.T) {
	t.Parallel()
	certs := certtest.New(t)
	const secret = "hunter2"
	plain := redistest.Start(t)
	locked := redistest.Start(t, redistest.Password(secret),
		redistest.User("idle", "on >"+secret+" ~* &* -@all +@connection"),
		redistest.User("reader", "on >"+secret+" ~* &* +@all -xadd -set"),
		redistest.User("elsewhere", "on >"+secret+" ~other:* &* +@all"))
	secured := redistest.Start(t, redistest.TLS(certs, true))
	replica := redistest.Start(t, redistest.Config("replicaof", "127.0.0.1 "+portOf(plain.Addr())))
	wrong := redistest.Start(t)
	if err := wrong.Client().Set(context.Background(), DefaultKey, "x", 0).Err(); err != nil {
		t.Fatal(err)
	}
	full := redistest.Start(t, redistest.Config("maxmemory", "1"), redistest.Config("maxmemory-policy", "noeviction"))
	slotless := redistest.Start(t, redistest.Config("cluster-enabled", "yes"))
	cluster := redistest.StartCluster(t, 0)
	sentinels := redistest.StartSentinel(t, 0, secret)
	nobody := "127.0.0.1:" + freeAddr(t)

	for name, c := range map[string]struct {
		config          Config
		announce, watch error // nil: it works
		text            string
	}{
		"works":             {config: Config{URLs: []string{plain.URL()}}},
		"wrong password":    {Config{URLs: []string{"redis://:wrong@" + locked.Addr()}}, discovery.ErrCredentials, discovery.ErrCredentials, "check the"},
		"wrong, keys":       {Config{Layout: LayoutKeys, URLs: []string{"redis://:wrong@" + locked.Addr()}}, discovery.ErrCredentials, discovery.ErrCredentials, "check the"},
		"no password":       {Config{URLs: []string{"redis://" + locked.Addr()}}, discovery.ErrCredentials, discovery.ErrCredentials, "asks for a password"},
		"unknown user":      {Config{URLs: []string{"redis://who:wrong@" + locked.Addr()}}, discovery.ErrCredentials, discovery.ErrCredentials, "check the"},
		"idle":              {Config{URLs: []string{"redis://idle:" + secret + "@" + locked.Addr()}}, discovery.ErrPermission, discovery.ErrPermission, "'evalsha'"},
		"reader":            {Config{URLs: []string{"redis://reader:" + secret + "@" + locked.Addr()}}, discovery.ErrPermission, nil, "command XADD"},
		"reader of keys":    {Config{Layout: LayoutKeys, URLs: []string{"redis://reader:" + secret + "@" + locked.Addr()}}, discovery.ErrPermission, nil, "'set'"},
		"elsewhere":         {Config{URLs: []string{"redis://elsewhere:" + secret + "@" + locked.Addr()}}, discovery.ErrPermission, discovery.ErrPermission, "key"},
		"elsewhere, keys":   {Config{Layout: LayoutKeys, URLs: []string{"redis://elsewhere:" + secret + "@" + locked.Addr()}}, discovery.ErrPermission, nil, "key"},
		"replica":           {Config{URLs: []string{replica.URL()}}, discovery.ErrPermission, nil, "replica"},
		"replica, keys":     {Config{Layout: LayoutKeys, URLs: []string{replica.URL()}}, discovery.ErrPermission, nil, "replica"},
		"wrong type":        {Config{URLs: []string{wrong.URL()}}, discovery.ErrInvalid, discovery.ErrInvalid, "something else"},
		"full":              {Config{URLs: []string{full.URL()}}, discovery.ErrFull, nil, "maxmemory"},
		"full, keys":        {Config{Layout: LayoutKeys, URLs: []string{full.URL()}}, discovery.ErrFull, nil, "maxmemory"},
		"cluster down":      {Config{Mode: ModeCluster, URLs: []string{slotless.URL()}}, discovery.ErrUnreachable, discovery.ErrUnreachable, ""},
		"slot down":         {Config{URLs: []string{slotless.URL()}}, discovery.ErrUnreachable, discovery.ErrUnreachable, "cluster is down"},
		"part of a cluster": {Config{Key: keyElsewhere(t, cluster), URLs: []string{cluster.Masters[0].URL()}}, discovery.ErrInvalid, discovery.ErrInvalid, "mode cluster"},
		"no cluster":        {Config{Mode: ModeCluster, URLs: []string{plain.URL()}}, discovery.ErrInvalid, discovery.ErrInvalid, "mode single"},
		"no such database":  {Config{DB: 99, URLs: []string{plain.URL()}}, discovery.ErrInvalid, discovery.ErrInvalid, "fewer databases"},
		"nobody":            {Config{URLs: []string{"redis://" + nobody}}, discovery.ErrUnreachable, discovery.ErrUnreachable, "refused"},
		"nobody, cluster":   {Config{URLs: []string{"redis+cluster://" + nobody}}, discovery.ErrUnreachable, discovery.ErrUnreachable, "refused"},
		"nobody, sentinel":  {Config{URLs: []string{"redis+sentinel://" + nobody}}, discovery.ErrUnreachable, discovery.ErrUnreachable, "Sentinel at " + nobody},
		"unknown master":    {Config{URLs: sentinels.URLs(), SentinelPassword: secret, SentinelMaster: "x"}, discovery.ErrNotFound, discovery.ErrNotFound, `no master "x"`},
		"sentinel password": {Config{URLs: sentinels.URLs(), SentinelPassword: "wrong"}, discovery.ErrCredentials, discovery.ErrCredentials, "Sentinel"},
		"no tls":            {Config{URLs: []string{"redis://" + secured.Addr()}}, discovery.ErrUnreachable, discovery.ErrUnreachable, "TLS"},
		"needless tls":      {Config{URLs: []string{"rediss://" + plain.Addr()}, TLSCA: certs.CA}, discovery.ErrUnreachable, discovery.ErrUnreachable, "TLS"},
		"unknown authority": {Config{URLs: []string{secured.URL()}}, discovery.ErrUnreachable, discovery.ErrUnreachable, "authority"},
		"no certificate":    {Config{URLs: []string{secured.URL()}, TLSCA: certs.CA}, discovery.ErrCredentials, discovery.ErrCredentials, "client's certificate"},
		"server name": {
			Config{URLs: []string{secured.URL()}, TLSCA: certs.CA, TLSCert: certs.ClientCert, TLSKey: certs.ClientKey, TLSServerName: "other.test"},
			discovery.ErrUnreachable, discovery.ErrUnreachable, "server name",
		},
		"right server name": {config: Config{URLs: []string{secured.URL()}, TLSCA: certs.CA, TLSCert: certs.ClientCert, TLSKey: certs.ClientKey, TLSServerName: "registry.test"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := open(t, c.config)
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			check := func(what string, err, want error) {
				t.Helper()
				switch {
				case want == nil && err != nil:
					t.Errorf("%s: %v", what, err)
				case want != nil:
					wantError(t, err, want)
					if err != nil && !strings.Contains(err.Error(), c.text) {
						t.Errorf("%s: %q, want %q in it", what, err, c.text)
					}
				}
				if err != nil && strings.Contains(err.Error(), secret) {
					t.Errorf("%s: %q tells the password", what, err)
				}
			}
			check("Announce", r.Announce(ctx, newNode("a")), c.announce)
			watchCtx, stop := context.WithCancel(ctx)
			err := r.Watch(watchCtx, func(e discovery.Event) {
				if e.Type == discovery.Synced {
					stop()
				}
			})
			stop()
			if errors.Is(err, context.Canceled) {
				err = nil
			}
			check("Watch", err, c.watch)
		})
	}
}

// TestFullServerRenews: no room for another record is no reason to let those
// lapse that are there.
func TestFullServerRenews(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx := context.Background()
	r := open(t, Config{URLs: []string{s.URL()}})
	announce(t, r, newNode("a"))
	if err := s.Client().ConfigSet(ctx, "maxmemory", "1").Err(); err != nil {
		t.Fatal(err)
	}
	announce(t, r, newNode("a"), newNode("a", discovery.KeyState, "draining"))
	wantError(t, r.Announce(ctx, newNode("b")), discovery.ErrFull)
	if err := r.Withdraw(ctx, newNode("a")); err != nil {
		t.Error(err)
	}
}

// TestLoading: a server that still reads its data is away, not empty.
func TestLoading(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, redistest.Config("key-load-delay", "150"))
	ctx := context.Background()
	pipe := s.Client().Pipeline()
	// While it loads it answers after each 1024 commands.
	for range 20_000 {
		pipe.Incr(ctx, "some-other-key")
	}
	if _, err := pipe.Exec(ctx); err != nil {
		t.Fatal(err)
	}
	r := open(t, Config{URLs: []string{s.URL()}})
	s.Stop()
	s.Launch()
	var err error
	eventually(t, "the server listens", func() bool {
		err = r.Announce(ctx, newNode("a"))
		return err == nil || !strings.Contains(err.Error(), "refused")
	})
	wantError(t, err, discovery.ErrUnreachable)
	if err != nil && !strings.Contains(err.Error(), "loading") {
		t.Errorf("error %q, want it to say that the server is loading", err)
	}
	eventually(t, "the server has loaded", func() bool { return r.Announce(ctx, newNode("a")) == nil })
}

// TestCallsEndWithTheirContext: the server hangs, and nobody waits for it.
func TestCallsEndWithTheirContext(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := open(t, Config{URLs: []string{s.URL()}})
	announce(t, r, newNode("a"))
	_, _, done := watchEvents(t, r)
	s.Pause()
	defer s.Resume()

	ctx, cancel := context.WithCancel(context.Background())
	called := make(chan error, 1)
	go func() { called <- r.Announce(ctx, newNode("a")) }()
	cancel()
	if err := <-called; !errors.Is(err, context.Canceled) {
		t.Errorf("Announce returned %v", err)
	}
	deadline, stop := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer stop()
	wantError(t, r.Announce(deadline, newNode("a")), context.DeadlineExceeded)
	wantError(t, r.Verify(deadline), context.DeadlineExceeded)
	// And the watch ends by itself.
	wantBroken(t, done)
	wantError(t, r.Verify(context.Background()), discovery.ErrBroken)
}

// TestClose ends what is under way.
func TestClose(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	r := open(t, Config{URLs: []string{s.URL()}})
	_, _, done := watchEvents(t, r)
	s.Pause()
	defer s.Resume()
	called := make(chan error, 1)
	go func() { called <- r.Announce(context.Background(), newNode("a")) }()
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Errorf("closed again: %v", err)
	}
	wantError(t, <-called, discovery.ErrUnreachable)
	if err := <-done; err == nil {
		t.Error("the watch ended without an error")
	}
	wantError(t, r.Announce(context.Background(), newNode("a")), discovery.ErrUnreachable)
	wantError(t, r.Watch(context.Background(), func(discovery.Event) {}), discovery.ErrUnreachable)
}

// TestReadOnlyUser watches with little more than the right to read.
func TestReadOnlyUser(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ rules, push string }{
		"Stream": {"~* &* -@all +@read +@connection +eval +evalsha +time", "stream"},
		"Poll":   {"~catga:nodes -@all +@connection +eval +evalsha +time +zrangebyscore +zcard", "poll"},
		"NotificationsWithoutStream": {
			"~catga:nodes &__keyspace* -@all +@connection +eval +evalsha +time +zrangebyscore +zcard +config|get +subscribe +ping", "notifications",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.Start(t, redistest.Notify("Kz"), redistest.User("reader", "on >pw "+c.rules))
			writer := open(t, Config{URLs: []string{s.URL()}})
			announce(t, writer, newNode("a"))
			r := open(t, Config{URLs: []string{"redis://reader:pw@" + s.Addr()}, Poll: 100 * time.Millisecond})
			d := directory(t, r, discovery.Options{})
			until(t, d, "a is listed", has("a"))
			if got := r.Changes(); got != c.push {
				t.Errorf("pushed by %q, want %q", got, c.push)
			}
			announce(t, writer, newNode("b"))
			until(t, d, "b joins", has("b"))
			if err := writer.Withdraw(context.Background(), newNode("a")); err != nil {
				t.Fatal(err)
			}
			until(t, d, "a leaves", lacks("a"))
			if status := d.Status(); status.Restarts != 0 {
				t.Errorf("the watch broke: %v", status.LastError)
			}
		})
	}
}

func portOf(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return port
}

// freeAddr returns a port that nobody listens on.
func freeAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	return portOf(l.Addr().String())
}

// keyElsewhere returns a key that the first master does not have.
func keyElsewhere(t *testing.T, c *redistest.Cluster) string {
	t.Helper()
	for _, key := range []string{"a", "b", "c", "d", "e", "f"} {
		if c.Owner(key) != c.Masters[0] {
			return key
		}
	}
	t.Fatal("no such key")
	return ""
}
