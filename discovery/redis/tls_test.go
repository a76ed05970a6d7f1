package redis

import (
	"context"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// The files of an authority and of a client are replaced while a registry is open,
// and the next connection goes by what is there then.
func TestReplacedCertificates(t *testing.T) {
	t.Parallel()
	for name, layout := range map[string]string{"sorted_set": LayoutSortedSet, "keys": LayoutKeys} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			before, after := certtest.New(t), certtest.New(t)
			s := redistest.Start(t, redistest.TLS(before, true))
			r := open(t, Config{URLs: []string{s.URL()}, Layout: layout,
				TLSCA: before.CA, TLSCert: before.ClientCert, TLSKey: before.ClientKey})
			d := directory(t, r, discovery.Options{})
			synced(t, d)
			announce(t, r, newNode("early"))
			until(t, d, "the node from before", has("early"))

			s.Stop()
			after.Replace(t, before)
			s.RenewCertificates()
			s.Restart()
			announceUntil(t, r, newNode("late"))
			until(t, d, "a node from after the files were replaced", has("late"))
		})
	}
}

// Sentinels and servers need not both speak TLS.
func TestSentinelTLS(t *testing.T) {
	t.Parallel()
	certs := certtest.New(t)
	for name, c := range map[string]struct {
		servers []redistest.Option
		urls    func(*redistest.Sentinel) []string
		tls     string
	}{
		"Sentinels alone": {nil, (*redistest.Sentinel).SecureURLs, TLSOn},
		"servers alone": {[]redistest.Option{redistest.TLS(certs, false)}, func(s *redistest.Sentinel) []string {
			var urls []string
			for _, u := range s.URLs() {
				urls = append(urls, strings.Replace(u, "redis+", "rediss+", 1))
			}
			return urls
		}, TLSOff},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := redistest.StartSecureSentinel(t, certs, c.servers...)
			config := Config{URLs: c.urls(s), SentinelMaster: redistest.SentinelMaster, TLSCA: certs.CA, SentinelTLS: c.tls}
			r := open(t, config)
			d := directory(t, r, discovery.Options{})
			synced(t, d)
			announce(t, r, newNode("a"))
			until(t, d, "the node", has("a"))

			// Not asked for, it is the same for both.
			config.SentinelTLS = ""
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := open(t, config).Announce(ctx, newNode("b")); err == nil {
				t.Error("without the option a node is announced")
			}
		})
	}
}
