package caddydiscovery

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddytls"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// onDemand is a site with on-demand certificates of Caddy's own issuer, which a registry
// in memory allows.
func onDemand(port, registry, hosts, permission string) string {
	return `{
		skip_install_trust
		local_certs
		auto_https disable_redirects
		storage file_system {$PERMISSION_TEST_STORAGE}
		discovery {
			registry main memory ` + registry + ` {
				warm_start off
				` + hosts + `
			}
		}
		on_demand_tls {
			permission discovery ` + permission + `
		}
	}
	https://:` + port + ` {
		tls {
			on_demand
		}
		respond "catch-all"
	}
	https://own.apps.example.com:` + port + ` {
		tls internal
		respond "own site"
	}`
}

// handshake asks for the certificate of a name.
func handshake(port, name string) error {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", "127.0.0.1:"+port, &tls.Config{
		ServerName: name, InsecureSkipVerify: true, // by an authority of this test's own
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0].VerifyHostname(name)
}

// permissionOf returns the permission of the config that runs.
func permissionOf(t *testing.T) *Permission {
	t.Helper()
	for _, d := range runningDirectories() {
		d.mu.Lock()
		permissions := d.permissions
		d.mu.Unlock()
		if len(permissions) > 0 {
			return permissions[len(permissions)-1]
		}
	}
	t.Fatal("no permission runs")
	return nil
}

func TestPermission(t *testing.T) {
	t.Setenv("PERMISSION_TEST_STORAGE", t.TempDir())
	name, m := newMemory(t)
	list(t, m, "a", "10.0.0.3:80", "service", "shop", "hosts", "a.apps.example.com, pay.example.com evil.example.org own.apps.example.com")
	port := freeport.String(t)
	load(t, onDemand(port, name, "hosts *.apps.example.com\nclaim billing* pay.example.com", "main"))

	if err := handshake(port, "a.apps.example.com"); err != nil {
		t.Errorf("the name of a node that is listed: %v", err)
	}
	eventually(t, "the site of the Caddyfile has its certificate", func() bool { return handshake(port, "own.apps.example.com") == nil })
	for _, denied := range []string{"b.apps.example.com", "pay.example.com", "evil.example.org", "x.a.apps.example.com", ""} {
		if err := handshake(port, denied); err == nil {
			t.Errorf("there is a certificate for %q", denied)
		}
		if err := permissionOf(t).CertificateAllowed(t.Context(), denied); !errors.Is(err, caddytls.ErrPermissionDenied) {
			t.Errorf("the permission for %q is %v, want a denial", denied, err)
		}
	}
	// A site of the Caddyfile is never a node's, although hosts names it.
	eventually(t, "the host of a site is refused", func() bool {
		return permissionOf(t).CertificateAllowed(t.Context(), "own.apps.example.com") != nil
	})
	values := scrape(t)
	if values["certificates_allowed_total listed"] < 1 || values["certificates_allowed_total denied"] < 8 || values["changes_total certificate"] < 1 {
		t.Errorf("counted %v listed, %v denied, %v certificates in the journal",
			values["certificates_allowed_total listed"], values["certificates_allowed_total denied"], values["changes_total certificate"])
	}

	// It joins and has one with the first handshake.
	list(t, m, "b", "10.0.0.4:80", "service", "billing-eu", "hosts", "pay.example.com")
	eventually(t, "a new service has a certificate", func() bool { return handshake(port, "pay.example.com") == nil })

	// Another configuration counts at once and opens nothing anew.
	opened := m.Watches()
	load(t, onDemand(port, name, "hosts b.apps.example.com", "{\nlinger 1h\n}"))
	list(t, m, "c", "10.0.0.5:80", "service", "cart", "hosts", "b.apps.example.com c.apps.example.com")
	eventually(t, "the new hosts count", func() bool { return handshake(port, "b.apps.example.com") == nil })
	if err := permissionOf(t).CertificateAllowed(t.Context(), "a.apps.example.com"); !errors.Is(err, caddytls.ErrPermissionDenied) {
		t.Errorf("a name that hosts does not name any more: %v, want a denial", err)
	}
	if now := m.Watches(); now != opened {
		t.Errorf("%d watches after the reload, want %d as before", now, opened)
	}
	d := permissionOf(t).directory
	if since, until := d.certificate(d.Snapshot().Hosts().Find("b.apps.example.com")); since.IsZero() || !until.IsZero() {
		t.Errorf("the certificate of a host with nodes is allowed from %v until %v, want for as long as they are there", since, until)
	}
}

func TestPermissionErrors(t *testing.T) {
	for name, c := range map[string]struct {
		hosts, permission string
		parts             []string
	}{
		"no hosts":        {"", "main", []string{"registry main", "hosts *.apps.example.com", "Caddyfile:"}},
		"claims alone":    {"claim a a.example.com", "", []string{"hosts *.apps.example.com"}},
		"not declared":    {"hosts a.example.com", "other", []string{`no registry "other"`, "main"}},
		"not declared so": {"hosts a.example.com", "nats://127.0.0.1:1", []string{"declare it", "hosts *.apps.example.com"}},
		"linger":          {"hosts a.example.com", "{\nlinger soon\n}", []string{"option linger", "soon", "Caddyfile:"}},
		"long linger":     {"hosts a.example.com", "{\nlinger 1000h\n}", []string{"linger", "720h", "Caddyfile:"}},
		"limit":           {"hosts a.example.com", "{\nlimit 40\n}", []string{"limit <names> <duration>", "Caddyfile:"}},
		"limit of none":   {"hosts a.example.com", "{\nlimit 0 1h\n}", []string{"limit", "Caddyfile:"}},
		"limit for ever":  {"hosts a.example.com", "{\nlimit 1 0s\n}", []string{"limit", "Caddyfile:"}},
		"unknown option":  {"hosts a.example.com", "{\nlingers 1h\n}", []string{"permission discovery", `unknown option "lingers"`, "linger", "Caddyfile:"}},
		"two registries":  {"hosts a.example.com", "main main", []string{"main", "Caddyfile:"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("PERMISSION_TEST_STORAGE", t.TempDir())
			registry, _ := newMemory(t)
			wantError(t, name, validate(onDemand("9", registry, c.hosts, c.permission)), c.parts...)
		})
	}
}

// Whatever clients ask for, and however many, waits no longer than it may and does no harm.
func TestPermissionOfMadeUpNames(t *testing.T) {
	t.Setenv("PERMISSION_TEST_STORAGE", t.TempDir())
	name, m := newMemory(t)
	m.Break()
	port := freeport.String(t)
	load(t, onDemand(port, name, "hosts *.apps.example.com", "{\nsync_timeout 50ms\n}"))
	p := permissionOf(t)
	p.started.Store(time.Now().Add(time.Hour).UnixNano()) // they would wait for an hour
	ctx, cancel := context.WithCancel(t.Context())
	var asking sync.WaitGroup
	for i := range maxHandshakes {
		asking.Go(func() { _ = p.CertificateAllowed(ctx, fmt.Sprintf("h%d.apps.example.com", i)) })
	}
	eventually(t, "as many wait as may", func() bool { return p.waiting.Load() == maxHandshakes })
	err := p.CertificateAllowed(t.Context(), "one.more.than.that")
	if !errors.Is(err, caddytls.ErrPermissionDenied) {
		t.Errorf("a name that hosts does not name: %v", err)
	}
	err = p.CertificateAllowed(t.Context(), "one.apps.example.com")
	if !errors.Is(err, caddytls.ErrPermissionDenied) || !strings.Contains(err.Error(), "not been listed yet") {
		t.Errorf("one more than may wait: %v, want that it is not known yet", err)
	}
	if err := p.CertificateAllowed(t.Context(), "\x1b[31m"+strings.Repeat("x", 1<<16)); len(err.Error()) > 300 || strings.Contains(err.Error(), "\x1b") {
		t.Errorf("the error repeats what a client sent: %q", err)
	}
	cancel()
	asking.Wait()
	p.started.Store(time.Now().UnixNano())
	if err := p.CertificateAllowed(t.Context(), "two.apps.example.com"); !errors.Is(err, caddytls.ErrPermissionDenied) {
		t.Errorf("after sync_timeout: %v", err)
	}
}
