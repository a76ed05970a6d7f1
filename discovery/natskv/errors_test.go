package natskv_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// wantBoth fails the test unless neither watching nor announcing works.
func wantBoth(t *testing.T, config natskv.Config, sentinel error, words ...string) {
	t.Helper()
	r := open(t, config)
	wantError(t, r.Announce(t.Context(), node(t, "a")), sentinel, words...)
	wantError(t, watch(t, r).Broken(), sentinel, words...)
}

func TestNobodyThere(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	s.Stop()
	wantBoth(t, natskv.Config{URLs: []string{"nats://u:" + secret + "@" + s.Addr()}}, discovery.ErrUnreachable, s.Addr())
}

func TestWrongCredentials(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Token(secret))
	wantBoth(t, natskv.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{Token: secret + "x"}},
		discovery.ErrCredentials, s.Addr())
}

// A login, a second URL and a domain are enough for every call.
func TestOptionsServeEveryCall(t *testing.T) {
	t.Parallel()
	dead := natstest.Start(t)
	dead.Stop()
	for name, test := range map[string]struct {
		option natstest.Option
		config natskv.Config
	}{
		"login":  {natstest.Token(secret), natskv.Config{Conn: natsconn.Options{Token: secret}}},
		"domain": {natstest.Domain("hub"), natskv.Config{Domain: "hub"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := natstest.Start(t, test.option)
			config := test.config
			config.URLs = []string{dead.URL(), s.URL()}
			wantWhole(t, open(t, config), 0)
		})
	}
}

func TestPermissions(t *testing.T) {
	t.Parallel()
	const api, kv = "$JS.API.", "$KV.catga_nodes."
	for name, test := range map[string]struct {
		publish, subscribe string // what is denied
		announce, watch    bool   // what is meant to fail
		history            bool
	}{
		"write":       {publish: kv + ">", announce: true},
		"other keys":  {publish: kv + "node.other"},
		"find":        {publish: api + "STREAM.INFO.>", announce: true, watch: true, history: true},
		"watch":       {publish: api + "CONSUMER.CREATE.>", watch: true, history: true},
		"read":        {publish: api + "CONSUMER.MSG.NEXT.>", watch: true, history: true},
		"everything":  {publish: ">", announce: true, watch: true, history: true},
		"answers":     {subscribe: "_INBOX.>", announce: true, watch: true, history: true},
		"bid goodbye": {publish: api + "CONSUMER.DELETE.>"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			user := natstest.User{Name: "u", Password: secret}
			denied := test.publish
			if test.publish != "" {
				user.Publish = natstest.Deny(test.publish)
			} else {
				denied = test.subscribe
				user.Subscribe = natstest.Deny(test.subscribe)
			}
			denied = strings.TrimSuffix(denied, ">")
			s := natstest.Start(t, natstest.Users(natstest.User{Name: "admin", Password: secret}, user))
			s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes"})
			config := natskv.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{User: "u", Password: secret}}
			r := open(t, config)

			check := func(what string, fails bool, err error) {
				t.Helper()
				if fails {
					wantError(t, err, discovery.ErrPermission, denied)
				} else if err != nil {
					t.Errorf("%s: %v", what, err)
				}
			}
			check("Announce", test.announce, r.Announce(t.Context(), node(t, "a")))
			_, err := r.History(t.Context(), "a", 0)
			check("History", test.history, err)
			w := watch(t, r)
			if test.watch {
				check("Watch", true, w.Broken())
			} else {
				w.Listing()
				w.Stop()
			}
		})
	}
}

// What one caller may not do does not end what another does.
func TestPermissionOfOneOperation(t *testing.T) {
	t.Parallel()
	user := natstest.User{Name: "u", Password: secret, Publish: natstest.Deny("$KV.catga_nodes.node.other")}
	s := natstest.Start(t, natstest.Users(user))
	r := open(t, natskv.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{User: "u", Password: secret}})
	w := watch(t, r)
	w.Listing()
	wantError(t, r.Announce(t.Context(), node(t, "other")), discovery.ErrPermission, "node.other")
	announce(t, r, node(t, "a"))
	w.Want(discovery.Put, "a")
}

func TestCreateDenied(t *testing.T) {
	t.Parallel()
	user := natstest.User{Name: "u", Password: secret, Publish: natstest.Deny("$JS.API.STREAM.CREATE.>")}
	s := natstest.Start(t, natstest.Users(user))
	wantBoth(t, natskv.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{User: "u", Password: secret}},
		discovery.ErrPermission, "$JS.API.STREAM.CREATE.KV_catga_nodes")
}

func TestNoJetStream(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.NoJetStream())
	wantBoth(t, natskv.Config{URLs: []string{s.URL()}}, discovery.ErrUnsupported, "JetStream", "-js")
}

func TestNoJetStreamForAccount(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Configure(func(o *server.Options) {
		account := server.NewAccount("A")
		o.Accounts = []*server.Account{account}
		o.Users = []*server.User{{Username: "u", Password: secret, Account: account}}
	}))
	wantBoth(t, natskv.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{User: "u", Password: secret}},
		discovery.ErrUnsupported, "JetStream")
}

func TestWrongDomain(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Domain("hub"))
	wantBoth(t, natskv.Config{URLs: []string{s.URL()}, Domain: "leaf"}, discovery.ErrUnsupported, "leaf")
}

func TestBucketMissing(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	config := natskv.Config{URLs: []string{s.URL() + "/fleet"}, NoCreate: true}
	wantBoth(t, config, discovery.ErrNotFound, "fleet", "create is off", "nats kv add fleet")
	_, err := open(t, config).History(t.Context(), "a", 0)
	wantError(t, err, discovery.ErrNotFound, "fleet")
}

func TestNotABucket(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	if _, err := s.JetStream().CreateStream(t.Context(), jetstream.StreamConfig{Name: "KV_catga_nodes", Subjects: []string{"x"}}); err != nil {
		t.Fatal(err)
	}
	wantBoth(t, natskv.Config{URLs: []string{s.URL()}}, discovery.ErrInvalid, "KV_catga_nodes", "no key-value bucket")
}

func TestFullBucket(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}, MaxBytes: 4 << 10})
	var err error
	for i := 0; err == nil && i < 100; i++ {
		err = r.Announce(t.Context(), node(t, fmt.Sprint(i)))
	}
	wantError(t, err, discovery.ErrFull, "max_bytes", "catga_nodes")
	// What is there can still be read.
	if listed, _ := watch(t, r).Listing(); len(listed) == 0 {
		t.Error("a full bucket lists nothing")
	}
}

func TestNoRoomForBucket(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.MaxStore(1<<20))
	wantBoth(t, natskv.Config{URLs: []string{s.URL()}}, discovery.ErrFull, "catga_nodes", "max_bytes")
	s = natstest.Start(t, natstest.MaxMemory(1<<20))
	wantBoth(t, natskv.Config{URLs: []string{s.URL()}, Storage: natskv.StorageMemory}, discovery.ErrFull, "catga_nodes")
}

func TestReplicasWithoutCluster(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	wantBoth(t, natskv.Config{URLs: []string{s.URL()}, Replicas: 3}, discovery.ErrUnsupported, "replicas 1")
}

func TestInvalidNodes(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	for _, id := range []string{"", "a\nb", strings.Repeat("x", discovery.MaxID+1)} {
		n := node(t, id)
		if err := r.Announce(t.Context(), n); !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("Announce of %q: %v", id, err)
		}
		if err := r.Withdraw(t.Context(), n); !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("Withdraw of %q: %v", id, err)
		}
		if _, err := r.History(t.Context(), id, 0); !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("History of %q: %v", id, err)
		}
	}
	if n := s.NumClients(); n != 0 {
		t.Errorf("%d connections for nothing", n)
	}
}

// The bucket's own limit of a value, set by its owner.
func TestRecordTooLarge(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	s.Bucket(jetstream.KeyValueConfig{Bucket: "catga_nodes", MaxValueSize: 100})
	r := open(t, natskv.Config{URLs: []string{s.URL()}})
	wantError(t, r.Announce(t.Context(), node(t, "a", "service", strings.Repeat("x", 100))), discovery.ErrInvalid, "larger")
}
