package natslink_test

import (
	"os"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestHandshakeFirst(t *testing.T) {
	t.Parallel()
	waits := natstest.Start(t, natstest.TLS(), natstest.HandshakeFirst())
	speaks := natstest.Start(t, natstest.TLS())
	mustGet(t, open(t, natslink.Config{URLs: []string{waits.URL()}, Options: natsconn.Options{TLSCA: waits.TLS.CA, TLSHandshakeFirst: true}}))
	mustGet(t, open(t, natslink.Config{URLs: []string{"nats://" + waits.Addr()}, Options: natsconn.Options{TLSCA: waits.TLS.CA, TLSHandshakeFirst: true}}))

	_, err := open(t, natslink.Config{URLs: []string{waits.URL()}, Options: natsconn.Options{TLSCA: waits.TLS.CA}}).Get(t.Context())
	wantError(t, err, discovery.ErrUnreachable, "tls_handshake_first on")
	_, err = open(t, natslink.Config{URLs: []string{speaks.URL()}, Options: natsconn.Options{TLSCA: speaks.TLS.CA, TLSHandshakeFirst: true}}).Get(t.Context())
	wantError(t, err, discovery.ErrUnreachable, "tls_handshake_first off")
	wantError(t, natslink.Config{URLs: []string{"wss://h"}, Options: natsconn.Options{TLSHandshakeFirst: true}}.Validate(), discovery.ErrInvalid, "wss://")
}

// Users may be allowed to hear answers on subjects of their own only, which keeps
// them from hearing those of others.
func TestInboxPrefix(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Users(natstest.User{
		Name: "u", Password: secret, Subscribe: natstest.Allow("_INBOX_proxy.>", "echo"),
	}))
	config := natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{User: "u", Password: secret}}
	link := mustGet(t, open(t, config))
	if _, err := link.RequestWithContext(t.Context(), "echo", nil); err == nil {
		t.Error("a request succeeded without an inbox")
	}
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrPermission, "subscribe", "_INBOX", "inbox_prefix")

	for _, prefix := range []string{"_INBOX_proxy", "_INBOX_proxy.eu"} {
		config.InboxPrefix = prefix
		link = mustGet(t, open(t, config))
		queries, err := link.SubscribeSync("echo")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			if m, err := queries.NextMsgWithContext(t.Context()); err == nil {
				_ = m.Respond([]byte("yes")) // the request fails without it
			}
		}()
		if m, err := link.RequestWithContext(t.Context(), "echo", nil); err != nil || string(m.Data) != "yes" {
			t.Errorf("with the prefix %s: %v", prefix, err)
		}
	}

	for _, prefix := range []string{"_INBOX.>", "a..b", ".", "a b", "$SYS", "a*", "é"} {
		wantError(t, natslink.Config{Options: natsconn.Options{InboxPrefix: prefix}}.Validate(), discovery.ErrInvalid, "inbox prefix", "_INBOX_proxy")
	}
}

// Whoever renews certificates, seeds or credentials writes them into the files that
// are there, and tells nobody.
func TestReplacedFiles(t *testing.T) {
	t.Parallel()
	t.Run("certificates", func(t *testing.T) {
		t.Parallel()
		s := natstest.Start(t, natstest.MutualTLS())
		conn := open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{TLSCA: s.TLS.CA, TLSCert: s.TLS.ClientCert, TLSKey: s.TLS.ClientKey}})
		link := mustGet(t, conn)
		s.Stop()
		await(t, "the loss of the connection", link.Lost())
		certtest.New(t).Replace(t, s.TLS)
		s.RenewCertificates()
		s.Restart()
		mustGet(t, conn)
	})
	for name, test := range map[string]struct {
		login natstest.Option
		file  func(*natstest.Server) string
		use   func(file string) natslink.Config
	}{
		"seed": {natstest.NKey(), func(s *natstest.Server) string { return s.Seed },
			func(file string) natslink.Config { return natslink.Config{Options: natsconn.Options{NKey: file}} }},
		"credentials": {natstest.Operator(), func(s *natstest.Server) string { return s.Creds },
			func(file string) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Credentials: file}}
			}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			before := natstest.Start(t, test.login)
			config := test.use(test.file(before))
			config.URLs = []string{before.URL()}
			conn := open(t, config)
			link := mustGet(t, conn)
			before.Stop()
			await(t, "the loss of the connection", link.Lost())
			after := natstest.Start(t, natstest.Configure(func(o *server.Options) { o.Port = before.Port }), test.login)
			renewed, err := os.ReadFile(test.file(after))
			if err == nil {
				err = os.WriteFile(test.file(before), renewed, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			deadline := time.Now().Add(patience)
			for {
				if _, err = conn.Get(t.Context()); err == nil || time.Now().After(deadline) {
					break
				}
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
}
