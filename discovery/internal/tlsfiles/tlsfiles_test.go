package tlsfiles

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
)

const secret = "a-secret-in-a-file"

func TestInvalid(t *testing.T) {
	t.Parallel()
	c, other := certtest.New(t), certtest.New(t)
	garbage := filepath.Join(t.TempDir(), "garbage")
	if err := os.WriteFile(garbage, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	const missing = "/nowhere/file.pem"
	for name, test := range map[string]struct {
		files Files
		want  []string
	}{
		"certificate alone":   {Files{Cert: c.ClientCert}, []string{"tls_client_auth", "key"}},
		"key alone":           {Files{Key: c.ClientKey}, []string{"tls_client_auth", "certificate"}},
		"no authority":        {Files{CA: missing}, []string{"tls_ca", missing}},
		"garbage for it":      {Files{CA: garbage}, []string{"tls_ca", garbage, "PEM"}},
		"no certificate":      {Files{Cert: missing, Key: c.ClientKey}, []string{"tls_client_auth", missing}},
		"no key":              {Files{Cert: c.ClientCert, Key: missing}, []string{"tls_client_auth", missing}},
		"garbage for the key": {Files{Cert: c.ClientCert, Key: garbage}, []string{"tls_client_auth", garbage}},
		"another's key":       {Files{Cert: c.ClientCert, Key: other.ClientKey}, []string{"tls_client_auth", c.ClientCert, other.ClientKey}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := test.files.Config("127.0.0.1")
			if !errors.Is(err, discovery.ErrInvalid) {
				t.Fatalf("error %v, want one that wraps %q", err, discovery.ErrInvalid)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q, want one that says %q", err, want)
				}
			}
			if strings.Contains(err.Error(), secret) {
				t.Errorf("error %q shows what is in a file", err)
			}
		})
	}
}

// handshake connects with the configuration of the moment to a server that shows
// the certificate of c and asks for one that c's authority signed.
func handshake(t *testing.T, f Files, c certtest.Certificates) error {
	t.Helper()
	config, err := f.Config("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(c.ServerCert, c.ServerKey)
	if err != nil {
		t.Fatal(err)
	}
	authorities := c.ClientConfig(t).RootCAs
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	served := make(chan error, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			defer conn.Close()
			err = tls.Server(conn, &tls.Config{
				MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair},
				ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: authorities,
			}).HandshakeContext(context.Background())
		}
		served <- err
	}()
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := tls.Client(conn, config).HandshakeContext(t.Context()); err != nil {
		conn.Close()
		<-served
		return err
	}
	return <-served
}

func TestReplacedFiles(t *testing.T) {
	t.Parallel()
	before, after := certtest.New(t), certtest.New(t)
	f := Files{CA: before.CA, Cert: before.ClientCert, Key: before.ClientKey}
	if err := handshake(t, f, before); err != nil {
		t.Errorf("with its own authority: %v", err)
	}
	if err := handshake(t, f, after); err == nil {
		t.Error("a server of another authority is trusted")
	}
	after.Replace(t, before)
	if err := handshake(t, f, before); err != nil {
		t.Errorf("after the files were replaced: %v", err)
	}
}

func TestServerName(t *testing.T) {
	t.Parallel()
	c := certtest.New(t)
	for name, valid := range map[string]bool{"": true, "registry.test": true, "other.test": false} {
		f := Files{CA: c.CA, Cert: c.ClientCert, Key: c.ClientKey, ServerName: name}
		if err := handshake(t, f, c); (err == nil) != valid {
			t.Errorf("server name %q: %v, want it accepted: %t", name, err, valid)
		}
	}
}
