package natslink_test

import (
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestLogin(t *testing.T) {
	t.Parallel()
	wrongSeed := natstest.Start(t, natstest.NKey()).Seed
	wrongCreds := natstest.Start(t, natstest.Operator()).Creds
	for name, test := range map[string]struct {
		option      natstest.Option
		right, bad  func(*natstest.Server) natslink.Config
		wantRefusal string
	}{
		"token": {
			option: natstest.Token(secret),
			right: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Token: secret}}
			},
			bad: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Token: secret + "x"}}
			},
		},
		"user": {
			option: natstest.Users(natstest.User{Name: "u", Password: secret}),
			right: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{User: "u", Password: secret}}
			},
			bad: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{User: "u", Password: secret + "x"}}
			},
		},
		"user info": {
			option: natstest.Users(natstest.User{Name: "u", Password: secret}),
			right: func(s *natstest.Server) natslink.Config {
				return natslink.Config{URLs: []string{s.URLWith(url.UserPassword("u", secret))}}
			},
			bad: func(s *natstest.Server) natslink.Config {
				return natslink.Config{URLs: []string{s.URLWith(url.UserPassword("u", secret+"x"))}}
			},
		},
		"nkey": {
			option: natstest.NKey(),
			right: func(s *natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{NKey: s.Seed}}
			},
			bad: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{NKey: wrongSeed}}
			},
		},
		"credentials": {
			option: natstest.Operator(),
			right: func(s *natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Credentials: s.Creds}}
			},
			bad: func(*natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Credentials: wrongCreds}}
			},
		},
		"no credentials": {
			option: natstest.Operator(),
			right: func(s *natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{Credentials: s.Creds}}
			},
			bad: func(*natstest.Server) natslink.Config { return natslink.Config{} },
		},
		"mutual TLS": {
			option: natstest.MutualTLS(),
			right: func(s *natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{TLSCA: s.TLS.CA, TLSCert: s.TLS.ClientCert, TLSKey: s.TLS.ClientKey}}
			},
			bad: func(s *natstest.Server) natslink.Config {
				return natslink.Config{Options: natsconn.Options{TLSCA: s.TLS.CA}}
			},
			wantRefusal: "tls_client_auth",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := natstest.Start(t, test.option)
			config := func(make func(*natstest.Server) natslink.Config) natslink.Config {
				c := make(s)
				if c.URLs == nil {
					c.URLs = []string{s.URL()}
				}
				return c
			}
			mustGet(t, open(t, config(test.right)))
			_, err := open(t, config(test.bad)).Get(t.Context())
			wantError(t, err, discovery.ErrCredentials, s.Addr(), test.wantRefusal)
		})
	}
}

func TestFiles(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.Operator())
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage")
	if err := os.WriteFile(garbage, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(dir, "missing")
	for name, options := range map[string]natsconn.Options{
		"credentials": {Credentials: garbage},
		"nkey":        {NKey: garbage},
		"authority":   {TLSCA: garbage},
		"certificate": {TLSCert: garbage, TLSKey: garbage},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := natslink.Config{URLs: []string{s.URL()}, Options: options}
			_, err := open(t, config).Get(t.Context())
			wantError(t, err, discovery.ErrInvalid, garbage)
			for _, field := range []*string{&config.Credentials, &config.NKey, &config.TLSCA, &config.TLSCert, &config.TLSKey} {
				if *field != "" {
					*field = missing
				}
			}
			_, err = open(t, config).Get(t.Context())
			wantError(t, err, fs.ErrNotExist, missing)
			wantError(t, err, discovery.ErrInvalid)
		})
	}
	t.Run("written later", func(t *testing.T) {
		t.Parallel()
		late := filepath.Join(dir, "late.creds")
		conn := open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{Credentials: late}})
		_, err := conn.Get(t.Context())
		wantError(t, err, fs.ErrNotExist, late)
		data, err := os.ReadFile(s.Creds)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(late, data, 0o600); err != nil {
			t.Fatal(err)
		}
		mustGet(t, conn)
	})
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

func TestCredentialsExpire(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t, natstest.OperatorUntil(time.Now().Add(3*time.Second)))
	conn := open(t, natslink.Config{URLs: []string{s.URL()}, Options: natsconn.Options{Credentials: s.Creds}})
	link := mustGet(t, conn)
	await(t, "the loss of the connection", link.Lost())
	wantError(t, link.Err(), discovery.ErrCredentials, "expired")
	// Within the very second of the expiry the server lets them in once more.
	deadline := time.Now().Add(patience)
	for {
		_, err := conn.Get(t.Context())
		if err != nil {
			wantError(t, err, discovery.ErrCredentials)
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the expired credentials are still accepted")
		}
	}
}
