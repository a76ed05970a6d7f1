package redis

import (
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
