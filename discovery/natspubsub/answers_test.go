package natspubsub_test

import (
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// A record that nobody renews does not stand for its process any more.
func TestAnswersEndWithLease(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	announce(t, r, node(t, "long"), node(t, "short", "lease", discovery.MinLease.String()))
	listed, _ := watch(t, open(t, config(s))).Listing()
	if len(listed) == 0 || listed[0].ID != "long" {
		t.Fatalf("listed %v", listed)
	}
	deadline := time.Now().Add(patience)
	for len(listed) != 1 {
		if time.Now().After(deadline) {
			t.Fatalf("still listed %v", listed)
		}
		w := watch(t, open(t, config(s)))
		listed, _ = w.Listing()
		w.Stop()
	}
}

// Whoever may ask cannot make us publish to any subject he likes.
func TestAnswersGoToInboxesOnly(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	announce(t, r, node(t, "a"))
	nc := s.Conn()
	said := listen(t, nc, ">")
	for _, reply := range []string{"catga.nodes.leave", "$JS.API.STREAM.PURGE.orders", "orders.new", "_INBOXES.x", ""} {
		if reply == "" {
			publish(t, nc, "catga.nodes.query", "")
		} else if err := nc.PublishRequest("catga.nodes.query", reply, nil); err != nil {
			t.Fatal(err)
		}
		if m := next(t, said); m.Subject != "catga.nodes.query" {
			t.Errorf("%s got %s", m.Subject, m.Data)
		}
	}
	if err := nc.PublishRequest("catga.nodes.query", "_INBOX.x", []byte("whatever")); err != nil {
		t.Fatal(err)
	}
	next(t, said)
	m := next(t, said)
	if got, err := discovery.ParseNode(m.Data); m.Subject != "_INBOX.x" || err != nil || got.ID != "a" {
		t.Errorf("%s got %s: %v", m.Subject, m.Data, err)
	}
}

// Who asks from another account has his inbox renamed by the server.
func TestAnswerToAnotherAccount(t *testing.T) {
	t.Parallel()
	fleet, edge := server.NewAccount("fleet"), server.NewAccount("edge")
	s := start(t, natstest.Configure(func(o *server.Options) {
		o.Accounts = []*server.Account{fleet, edge}
		o.Users = []*server.User{
			{Username: "fleet", Password: secret, Account: fleet},
			{Username: "edge", Password: secret, Account: edge},
		}
	}))
	// The server has accounts of its own by these names.
	exporter, err := s.Server().LookupAccount("fleet")
	if err != nil {
		t.Fatal(err)
	}
	importer, err := s.Server().LookupAccount("edge")
	if err != nil {
		t.Fatal(err)
	}
	if err := exporter.AddServiceExportWithResponse("catga.nodes.query", server.Streamed, nil); err != nil {
		t.Fatal(err)
	}
	if err := importer.AddServiceImport(exporter, "catga.nodes.query", "catga.nodes.query"); err != nil {
		t.Fatal(err)
	}
	c := config(s)
	c.Conn.User, c.Conn.Password = "fleet", secret
	r := open(t, c)
	announce(t, r, node(t, "a"))
	c.Conn.User = "edge"
	watch(t, open(t, c)).Want(discovery.Put, "a")
}

// No answer follows the goodbye of its node, however they are timed.
func TestNoAnswerAfterGoodbye(t *testing.T) {
	t.Parallel()
	s := start(t)
	r := open(t, config(s))
	nc := s.Conn()
	heard := listen(t, nc, ">")
	if err := heard.SetPendingLimits(-1, -1); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
				if err := nc.PublishRequest("catga.nodes.query", "_INBOX.x", nil); err != nil {
					t.Error(err)
				}
				_ = nc.Flush()
			}
		}
	})
	for i := range 200 {
		n := node(t, fmt.Sprint("n", i))
		announce(t, r, n)
		withdraw(t, r, n)
	}
	close(done)
	group.Wait()
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	gone, answers := make(map[string]bool), 0
	for {
		pending, _, err := heard.Pending()
		if err != nil {
			t.Fatal(err)
		}
		if pending == 0 {
			break
		}
		m := next(t, heard)
		var said struct {
			NodeID string `json:"nodeId"`
		}
		_ = json.Unmarshal(m.Data, &said) // queries, and answers with nothing
		switch {
		case m.Subject == "catga.nodes.leave":
			gone[said.NodeID] = true
		case m.Subject == "_INBOX.x" && said.NodeID != "":
			answers++
			if gone[said.NodeID] {
				t.Errorf("%s was answered for after it had left", said.NodeID)
			}
		}
	}
	t.Logf("%d answers", answers)
}

// Who may neither be asked nor answer is learnt of by his next heartbeat.
func TestAnswerDenied(t *testing.T) {
	t.Parallel()
	user := natstest.User{Name: "u", Password: secret, Publish: natstest.Deny("_INBOX.>")}
	s := start(t, natstest.Users(natstest.User{Name: "admin", Password: secret}, user))
	mute, listener := config(s), config(s)
	mute.Conn.User, mute.Conn.Password = "u", secret
	listener.Conn.User, listener.Conn.Password = "admin", secret
	r, answers := open(t, mute), open(t, listener)
	announce(t, r, node(t, "a"))
	announce(t, answers, node(t, "b"))
	w := watch(t, open(t, listener))
	w.Want(discovery.Put, "b")
	w.Want(discovery.Synced, "")
	announce(t, r, node(t, "a"))
	w.Want(discovery.Put, "a")
	if n := s.NumClients(); n != 3 {
		t.Errorf("%d connections, want 3", n)
	}
}

// What was refused is not answered with.
func TestRefusedRecordDoesNotStand(t *testing.T) {
	t.Parallel()
	user := natstest.User{Name: "u", Password: secret, Publish: natstest.Deny("catga.nodes.join", "catga.nodes.heartbeat")}
	s := start(t, natstest.Users(natstest.User{Name: "admin", Password: secret}, user))
	c := config(s)
	c.Conn.User, c.Conn.Password = "u", secret
	r := open(t, c)
	wantError(t, r.Announce(t.Context(), node(t, "a")), discovery.ErrPermission, "catga.nodes.join")
	if listed, _ := watch(t, r).Listing(); len(listed) != 0 {
		t.Errorf("listed %v", listed)
	}
}

// A user may be kept from every inbox but his own, and is answered there all the
// same by nodes that know nothing of it.
func TestInboxPrefix(t *testing.T) {
	t.Parallel()
	fleet := natstest.Allow("catga.nodes.*", "_INBOX_proxy.>", "answers.proxy.>")
	s := natstest.Start(t, natstest.Users(
		natstest.User{Name: "node", Password: secret},
		natstest.User{Name: "proxy", Password: secret, Subscribe: fleet},
	))
	config := func(user, prefix string) natspubsub.Config {
		return natspubsub.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{User: user, Password: secret, InboxPrefix: prefix}, Listen: patience}
	}
	announce(t, open(t, config("node", "")), node(t, "a"))
	wantError(t, watch(t, open(t, config("proxy", ""))).Broken(), discovery.ErrPermission, "_INBOX.")
	watch(t, open(t, config("proxy", "_INBOX_proxy"))).Want(discovery.Put, "a")

	// Any other prefix is taken for an inbox by those who have it as well.
	announce(t, open(t, config("node", "answers.proxy")), node(t, "b"))
	watch(t, open(t, config("proxy", "answers.proxy"))).Want(discovery.Put, "b")
}
