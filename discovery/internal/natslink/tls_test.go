package natslink_test

import (
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

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
	_, err = natslink.New(natslink.Config{URLs: []string{"wss://h"}, Options: natsconn.Options{TLSHandshakeFirst: true}})
	wantError(t, err, discovery.ErrInvalid, "wss://")
}
