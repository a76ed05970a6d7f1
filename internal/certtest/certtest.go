// Package certtest makes certificates for the servers of tests.
package certtest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Certificates are files in PEM: an authority, and what it signed for a server
// at 127.0.0.1 that is also called registry.test, and for a client.
type Certificates struct {
	CA                    string
	ServerCert, ServerKey string
	ClientCert, ClientKey string
}

// New makes a new authority and its certificates.
func New(t testing.TB) Certificates {
	t.Helper()
	a := authority{t: t, dir: t.TempDir()}
	a.key = a.newKey()
	a.cert = &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "certtest authority"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign,
	}
	c := Certificates{CA: a.write("ca.pem", "CERTIFICATE", a.sign(a.cert, a.key))}
	// A server is a client too: of its master, and on the bus of a cluster.
	c.ServerCert, c.ServerKey = a.issue("server", 2, x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth)
	c.ClientCert, c.ClientKey = a.issue("client", 3, x509.ExtKeyUsageClientAuth)
	return c
}

// ClientConfig returns what a client needs that trusts the authority and shows
// the client's certificate.
func (c Certificates) ClientConfig(t testing.TB) *tls.Config {
	t.Helper()
	ca, err := os.ReadFile(c.CA)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	pair, err := tls.LoadX509KeyPair(c.ClientCert, c.ClientKey)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12}
}

// Replace writes these certificates and keys into the files of others, as an
// operator renews them: the names stay.
func (c Certificates) Replace(t testing.TB, others Certificates) {
	t.Helper()
	for _, f := range []struct{ from, to string }{
		{c.CA, others.CA},
		{c.ServerCert, others.ServerCert}, {c.ServerKey, others.ServerKey},
		{c.ClientCert, others.ClientCert}, {c.ClientKey, others.ClientKey},
	} {
		pem, err := os.ReadFile(f.from)
		if err == nil {
			err = os.WriteFile(f.to, pem, 0o600) //nolint:gosec // both are files of the test
		}
		if err != nil {
			t.Fatalf("replacing certificates: %v", err)
		}
	}
}

type authority struct {
	t    testing.TB
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func (a authority) issue(name string, serial int64, usage ...x509.ExtKeyUsage) (cert, key string) {
	a.t.Helper()
	private := a.newKey()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(24 * time.Hour),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  usage,
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
		DNSNames:     []string{"registry.test"},
	}
	der, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		a.t.Fatalf("encoding the key of the %s: %v", name, err)
	}
	return a.write(name+".pem", "CERTIFICATE", a.sign(template, private)),
		a.write(name+".key", "EC PRIVATE KEY", der)
}

func (a authority) newKey() *ecdsa.PrivateKey {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatalf("making a key: %v", err)
	}
	return key
}

func (a authority) sign(template *x509.Certificate, key *ecdsa.PrivateKey) []byte {
	a.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatalf("signing a certificate: %v", err)
	}
	return der
}

func (a authority) write(name, kind string, der []byte) string {
	a.t.Helper()
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatalf("writing %s: %v", name, err)
	}
	return path
}
