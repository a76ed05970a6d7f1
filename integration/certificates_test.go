package integration

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// An authority is an ACME server, which is a Caddy, too. It looks for the challenges of
// all names at one address: that is its HTTP proxy, so that no name has to be in DNS and
// nobody needs port 80.
type authority struct {
	port  string
	root  string // the file with its certificate
	roots *x509.CertPool
}

func newAuthority(t *testing.T, challenges string) *authority {
	t.Helper()
	data := t.TempDir()
	a := &authority{port: freeport.String(t), root: filepath.Join(data, "caddy/pki/authorities/local/root.crt"), roots: x509.NewCertPool()}
	startIn(t, data, []string{"HTTP_PROXY=http://" + challenges, "http_proxy=", "NO_PROXY=", "no_proxy="}, "skip_install_trust",
		"https://localhost:"+a.port+" {\ntls internal {\non_demand\n}\nacme_server {\nchallenges http-01\nlifetime 5m\n}\n}")
	root, err := os.ReadFile(a.root)
	if err != nil || !a.roots.AppendCertsFromPEM(root) {
		t.Fatalf("the authority has no root certificate: %v", err)
	}
	return a
}

// handshake returns the certificate that a name has, which the authority has issued.
func (a *authority) handshake(port, name string) (*x509.Certificate, error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", "127.0.0.1:"+port, &tls.Config{ServerName: name, RootCAs: a.roots})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.ConnectionState().PeerCertificates[0], nil
}

// serial returns the serial number of the certificate that a name has, "" if it has none.
func (a *authority) serial(port, name string) string {
	c, err := a.handshake(port, name)
	if err != nil {
		return ""
	}
	return c.SerialNumber.String()
}

// TestCertificates has certificates issued by an ACME server for what nodes announce, and
// renewed while the registry is away, before and after a restart; and not for anything else.
func TestCertificates(t *testing.T) {
	t.Parallel()
	r := newKV(t)
	plain, secure, data := freeport.String(t), freeport.String(t), t.TempDir()
	ca := newAuthority(t, "127.0.0.1:"+plain)
	options := "http_port " + plain + "\nskip_install_trust\ndiscovery {\n" +
		strings.Replace(r.block("ttl 1h\nhosts *.apps.example.com"), "registry ", "registry main ", 1) + "\n}\n" +
		"on_demand_tls {\npermission discovery {\nlimit 2 168h\nsync_timeout 500ms\n}\n}"
	// The authority dates its certificates back by a minute: they are renewed soon after
	// they were issued, with each handshake.
	sites := "http://:" + plain + " {\nrespond plain\n}\nhttps://:" + secure + " {\ntls {\non_demand\nrenewal_window_ratio 0.83\nissuer acme {\n" +
		"dir https://localhost:" + ca.port + "/acme/local/directory\ntrusted_roots " + ca.root + "\ndisable_tlsalpn_challenge\n}\n}\nrespond secure\n}"
	p := startOn(t, data, options, sites)
	const first, second, third, nobodys = "a.apps.example.com", "b.apps.example.com", "c.apps.example.com", "d.apps.example.com"

	r.put("n1", camel("n1", "http://127.0.0.1:9", `"service":"a","hosts":"`+first+` evil.example.org"`))
	r.put("n2", camel("n2", "http://127.0.0.1:9", `"service":"b","hosts":"`+second+`"`))
	for _, name := range []string{first, second} {
		eventually(t, name+" has a certificate", func() bool { return ca.serial(secure, name) != "" })
	}
	r.put("n3", camel("n3", "http://127.0.0.1:9", `"service":"c","hosts":"`+third+`"`))
	eventually(t, "the third new name is one too many", func() bool {
		return ca.serial(secure, third) != "" || certificateAnswers(t, p, "limited") > 0
	})
	denied := func(when string) {
		t.Helper()
		for _, name := range []string{third, nobodys, "evil.example.org"} {
			if ca.serial(secure, name) != "" {
				t.Errorf("%s %s has a certificate", when, name)
			}
		}
		files, err := filepath.Glob(filepath.Join(data, "caddy/certificates/*/*"))
		if err != nil || len(files) != 2 {
			t.Errorf("%s there are certificates for %v, want two", when, files)
		}
	}
	denied("while the registry is there")

	r.stop()
	renewed := func(when string) {
		t.Helper()
		was := ca.serial(secure, first)
		if was == "" {
			t.Errorf("%s %s has no certificate", when, first)
		}
		eventually(t, first+" has another certificate "+when, func() bool {
			is := ca.serial(secure, first)
			if is == "" {
				t.Fatalf("%s %s has no certificate any more", when, first)
			}
			return is != was
		})
	}
	renewed("while the registry is away")
	denied("while the registry is away")
	last := ca.serial(secure, second)
	p.kill(syscall.SIGTERM)

	p = startOn(t, data, options, sites)
	if is := ca.serial(secure, second); is != last {
		// It is loaded first, and renewed then; unless it was being renewed before.
		t.Logf("%s has certificate %s after a restart, and had %s", second, is, last)
		if is == "" {
			t.Errorf("after a restart %s has no certificate", second)
		}
	}
	renewed("after a restart while the registry is away")
	denied("after a restart while the registry is away")

	watched := func() {
		t.Helper()
		eventually(t, "the registry is watched", func() bool {
			answer, err := ask("http://" + p.admin + "/discovery/registries")
			return err == nil && strings.Contains(answer, `"connected":true`)
		})
	}
	r.restart()
	watched()
	renewed("when the registry is back")
	denied("when the registry is back")
	p.kill(syscall.SIGTERM)

	// Its memory is lost, as that of a container is, and what is in the storage is not new.
	if err := os.RemoveAll(filepath.Join(data, "caddy/discovery")); err != nil {
		t.Fatal(err)
	}
	r.put("n4", camel("n4", "http://127.0.0.1:9", `"service":"d","hosts":"`+nobodys+`"`))
	p = startOn(t, data, strings.Replace(options, "limit 2", "limit 1", 1), sites)
	watched()
	for _, name := range []string{first, second, third} {
		if ca.serial(secure, name) == "" {
			t.Errorf("%s has no certificate after the memory is lost", name)
		}
	}
	if ca.serial(secure, nobodys) != "" {
		t.Errorf("%s has a certificate beyond the limit", nobodys)
	}
}

// certificateAnswers returns how often an answer was given.
func certificateAnswers(t *testing.T, p *proxy, answer string) (n float64) {
	t.Helper()
	metrics, err := ask("http://" + p.admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(metrics) {
		if strings.HasPrefix(line, "caddy_discovery_certificates_allowed_total{") && strings.Contains(line, `result="`+answer+`"`) {
			if _, err := fmt.Sscan(line[strings.LastIndexByte(line, ' '):], &n); err != nil {
				t.Fatal(err)
			}
		}
	}
	return n
}
