package natskv_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// A user may be kept from every inbox but his own.
func TestInboxPrefix(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{Name: "u", Password: secret, Subscribe: natstest.Allow("_INBOX_proxy.>")}))
	config := natskv.Config{URLs: []string{s.URL()}, Conn: natsconn.Options{User: "u", Password: secret}}
	wantBoth(t, config, discovery.ErrPermission, "inbox_prefix")
	config.Conn.InboxPrefix = "_INBOX_proxy"
	wantWhole(t, open(t, config), 0)
}

// The bucket may be another account's, which lets ours use its JetStream under the
// name of a domain.
func TestBucketOfAnotherAccount(t *testing.T) {
	t.Parallel()
	accounts := func(exports, imports string) string {
		return fmt.Sprintf(`
accounts {
  HUB { jetstream: enabled, users: [{user: hub, password: %[1]s}], exports: [%[2]s] }
  APP { users: [{user: app, password: %[1]s}], imports: [%[3]s] }
}`, secret, exports, imports)
	}
	const (
		exportAPI = `{service: "$JS.API.>", response_type: stream}`
		exportKV  = `{service: "$KV.>"}`
		importAPI = `{service: {account: HUB, subject: "$JS.API.>"}, to: "$JS.hub.API.>"}`
		importKV  = `{service: {account: HUB, subject: "$KV.>"}, to: "$JS.hub.API.$KV.>"}`
	)
	config := func(p *natstest.Process) natskv.Config {
		return natskv.Config{URLs: []string{p.URL()}, Conn: natsconn.Options{User: "app", Password: secret}, Domain: "hub"}
	}
	t.Run("whole", func(t *testing.T) {
		t.Parallel()
		p := natstest.StartProcess(t, accounts(exportAPI+","+exportKV, importAPI+","+importKV))
		wantWhole(t, open(t, config(p)), 0)
	})
	t.Run("nothing imported", func(t *testing.T) {
		t.Parallel()
		p := natstest.StartProcess(t, accounts(exportAPI+","+exportKV, ""))
		wantBoth(t, config(p), discovery.ErrUnsupported, `domain "hub"`)
	})
	t.Run("keys not imported", func(t *testing.T) {
		t.Parallel()
		p := natstest.StartProcess(t, accounts(exportAPI, importAPI))
		r := open(t, config(p))
		wantError(t, r.Announce(t.Context(), node(t, "a")), discovery.ErrUnreachable, "$JS.hub.API.$KV.catga_nodes.node.a", "import")
	})
}

// The bucket may be on a server that ours is a leaf of.
func TestBucketBeyondLeaf(t *testing.T) {
	t.Parallel()
	port := freeport.Get(t)
	hub := natstest.Start(t, natstest.Domain("hub"), natstest.Configure(func(o *server.Options) {
		o.LeafNode = server.LeafNodeOpts{Host: "127.0.0.1", Port: port}
	}))
	leaf := natstest.Start(t, natstest.Domain("leaf"), natstest.Configure(func(o *server.Options) {
		o.ServerName = "leaf"
		o.LeafNode = server.LeafNodeOpts{Remotes: []*server.RemoteLeafOpts{{
			URLs: server.RoutesFromStr(fmt.Sprintf("nats-leaf://127.0.0.1:%d", port)),
		}}}
	}))
	deadline := time.Now().Add(patience)
	for hub.Server().NumLeafNodes() == 0 {
		if time.Now().After(deadline) {
			t.Fatal("the leaf has not met its hub")
		}
	}
	r := open(t, natskv.Config{URLs: []string{leaf.URL()}, Domain: "hub"})
	for {
		err := r.Announce(t.Context(), node(t, "first"))
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	wantWhole(t, r, 1)
	hub.KeyValue("catga_nodes") // the bucket is there
	// Without the domain it is the leaf's own.
	wantWhole(t, open(t, natskv.Config{URLs: []string{leaf.URL()}}), 0)
}
