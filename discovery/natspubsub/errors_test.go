package natspubsub_test

import (
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// wantAll fails the test unless nothing works.
func wantAll(t *testing.T, config natspubsub.Config, sentinel error, words ...string) {
	t.Helper()
	r := open(t, config)
	wantError(t, r.Announce(t.Context(), node(t, "a")), sentinel, words...)
	wantError(t, r.Withdraw(t.Context(), node(t, "a")), sentinel, words...)
	wantError(t, watch(t, r).Broken(), sentinel, words...)
}

func TestNobodyThere(t *testing.T) {
	t.Parallel()
	s := start(t)
	s.Stop()
	wantAll(t, natspubsub.Config{URLs: []string{"nats+pubsub://u:" + secret + "@" + s.Addr()}}, discovery.ErrUnreachable, s.Addr())
}

func TestWrongCredentials(t *testing.T) {
	t.Parallel()
	s := start(t, natstest.Token(secret))
	wantAll(t, natspubsub.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{Token: secret + "x"}},
		discovery.ErrCredentials, s.Addr())
}

// A login and a second URL are enough for every call.
func TestOptionsServeEveryCall(t *testing.T) {
	t.Parallel()
	dead, s := start(t), start(t, natstest.Token(secret))
	dead.Stop()
	c := config(s)
	c.URLs, c.Conn = []string{dead.URL(), s.URL()}, natsconn.Options{Token: secret}
	r := open(t, c)
	w := watch(t, r)
	w.Listing()
	announce(t, r, node(t, "a"))
	w.Want(discovery.Put, "a")
	if err := r.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	withdraw(t, r, node(t, "a"))
	w.Want(discovery.Left, "a")
}

func TestPermissions(t *testing.T) {
	t.Parallel()
	const publish, subscribe = "publish to", "subscribe to"
	for name, test := range map[string]struct {
		operation, subject               string // what is denied
		announce, renew, withdraw, watch bool   // what is meant to fail
	}{
		"join":             {publish, "catga.nodes.join", true, false, false, false},
		"renew":            {publish, "catga.nodes.heartbeat", false, true, false, false},
		"leave":            {publish, "catga.nodes.leave", false, false, true, false},
		"ask":              {publish, "catga.nodes.query", false, false, false, true},
		"publish":          {publish, ">", true, true, true, true},
		"hear joins":       {subscribe, "catga.nodes.join", false, false, false, true},
		"hear heartbeats":  {subscribe, "catga.nodes.heartbeat", false, false, false, true},
		"hear goodbyes":    {subscribe, "catga.nodes.leave", false, false, false, true},
		"hear answers":     {subscribe, "_INBOX.>", false, false, false, true},
		"subscribe":        {subscribe, ">", false, false, false, true},
		"be asked":         {subscribe, "catga.nodes.query", false, false, false, false},
		"answer":           {publish, "_INBOX.>", false, false, false, false},
		"others' subjects": {publish, "catga.other.>", false, false, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			user := natstest.User{Name: "u", Password: secret}
			if test.operation == publish {
				user.Publish = natstest.Deny(test.subject)
			} else {
				user.Subscribe = natstest.Deny(test.subject)
			}
			s := start(t, natstest.Users(natstest.User{Name: "admin", Password: secret}, user))
			c := config(s)
			c.Conn.User, c.Conn.Password = "u", secret
			r := open(t, c)
			words := []string{test.operation}
			if test.subject != ">" {
				words = append(words, strings.TrimSuffix(test.subject, ">"))
			}
			check := func(what string, fails bool, err error) {
				t.Helper()
				if fails {
					wantError(t, err, discovery.ErrPermission, words...)
				} else if err != nil {
					t.Errorf("%s: %v", what, err)
				}
			}
			// The watch comes first, so that everything else shares a connection
			// on which something was denied, and comes between what is meant to
			// succeed.
			w := watch(t, r)
			if test.watch {
				check("Watch", true, w.Broken())
			} else {
				w.Listing()
			}
			n := node(t, "a")
			check("Announce", test.announce, r.Announce(t.Context(), n))
			check("Announce again", test.announce || test.renew, r.Announce(t.Context(), n))
			if test.watch {
				check("Watch", true, watch(t, r).Broken())
			}
			check("Withdraw", test.withdraw, r.Withdraw(t.Context(), n))
			if !test.watch && !test.announce {
				w.Want(discovery.Put, "a")
				w.Stop()
			}
			if n := s.NumClients(); n != 1 {
				t.Errorf("%d connections, want the one that stood all the time", n)
			}
		})
	}
}

// Both use the same subjects of one connection, and neither minds what the other
// may not do.
func TestPermissionOfOneOperation(t *testing.T) {
	t.Parallel()
	user := natstest.User{
		Name: "u", Password: secret,
		Publish: natstest.Deny("catga.nodes.leave"), Subscribe: natstest.Deny("catga.nodes.join"),
	}
	s := start(t, natstest.Users(user))
	c := config(s)
	c.Conn.User, c.Conn.Password = "u", secret
	r := open(t, c)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 50 {
			err := r.Watch(t.Context(), func(discovery.Event) {})
			if err == nil || !strings.Contains(err.Error(), `subscribe to "catga.nodes.join"`) {
				t.Errorf("Watch: %v", err)
			}
		}
	}()
	for range 50 {
		announce(t, r, node(t, "a")) // a join each time, since the goodbye forgets it
		wantError(t, r.Withdraw(t.Context(), node(t, "a")), discovery.ErrPermission, `publish to "catga.nodes.leave"`)
	}
	<-done
}

// The server's own limit, set by its operator.
func TestRecordTooLarge(t *testing.T) {
	t.Parallel()
	s := start(t, natstest.Configure(func(o *server.Options) { o.MaxPayload = 1024 }))
	r := open(t, config(s))
	wantError(t, r.Announce(t.Context(), node(t, "a", "service", strings.Repeat("x", 1024))), discovery.ErrInvalid, "larger")
}
