package redis

import (
	"context"
	"errors"
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
			r := openRegistry(t, c.config)
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
			writer := openRegistry(t, Config{URLs: []string{s.URL()}})
			announce(t, writer, newNode("a"))
			r := openRegistry(t, Config{URLs: []string{"redis://reader:pw@" + s.Addr()}, Poll: 100 * time.Millisecond})
			d := startDirectory(t, r, discovery.Options{})
			waitUntil(t, d, "a is listed", has("a"))
			if got := r.Changes(); got != c.push {
				t.Errorf("pushed by %q, want %q", got, c.push)
			}
			announce(t, writer, newNode("b"))
			waitUntil(t, d, "b joins", has("b"))
			if err := writer.Withdraw(context.Background(), newNode("a")); err != nil {
				t.Fatal(err)
			}
			waitUntil(t, d, "a leaves", lacks("a"))
			if status := d.Status(); status.Restarts != 0 {
				t.Errorf("the watch broke: %v", status.LastError)
			}
		})
	}
}

// TestRightsOfAWriter: what the documentation lists is enough to announce.
func TestRightsOfAWriter(t *testing.T) {
	t.Parallel()
	eachLayout(t, func(t *testing.T, layout string) {
		rights := map[string]string{
			LayoutSortedSet: "time hget hset hsetnx hdel hstrlen hincrby zadd zrem zcard zscore zrange zrangebyscore xadd pttl pexpire",
			LayoutKeys:      "exists set get strlen del hsetnx publish",
		}[layout]
		s := redistest.Start(t, redistest.User("writer", "on >pw ~* &* -@all +@connection +eval +evalsha +"+strings.ReplaceAll(rights, " ", " +")))
		r := openRegistry(t, Config{URLs: []string{"redis://writer:pw@" + s.Addr()}, Layout: layout})
		n := newNode("a")
		announce(t, r, n, n)
		if own, err := r.Drain(t.Context(), n); err != nil || !own {
			t.Errorf("draining: %v, %v", own, err)
		}
		if got, err := r.Record(t.Context(), "a"); err != nil || got.ID != "a" {
			t.Errorf("the record is %+v, %v", got, err)
		}
		if err := r.Withdraw(t.Context(), n); err != nil {
			t.Error(err)
		}
		n.Metadata = nil // that of any writer is removed
		if err := r.Withdraw(t.Context(), n); err != nil {
			t.Error(err)
		}
	})
}
