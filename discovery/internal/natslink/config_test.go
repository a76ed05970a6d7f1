package natslink_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
)

func TestValidate(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		config natslink.Config
		want   string // "" if it is valid
	}{
		"nothing":            {natslink.Config{}, ""},
		"every scheme":       {natslink.Config{URLs: []string{"nats://a", "tls://b:1", "ws://c", "wss://[::1]", "NATS://d/"}}, ""},
		"one login":          {natslink.Config{Options: natsconn.Options{Token: secret}}, ""},
		"two logins":         {natslink.Config{Options: natsconn.Options{Token: secret, User: "u", Password: secret}}, "token and user"},
		"login in URL too":   {natslink.Config{URLs: []string{"nats://u:" + secret + "@a"}, Options: natsconn.Options{NKey: "f"}}, "nkey and user info"},
		"password alone":     {natslink.Config{Options: natsconn.Options{Password: secret}}, "without a user"},
		"certificate alone":  {natslink.Config{Options: natsconn.Options{TLSCert: "c"}}, "key"},
		"key alone":          {natslink.Config{Options: natsconn.Options{TLSKey: "k"}}, "certificate"},
		"empty":              {natslink.Config{URLs: []string{""}}, "nats://host:port"},
		"bare":               {natslink.Config{URLs: []string{"a:4222"}}, "nats://host:port"},
		"bare with password": {natslink.Config{URLs: []string{"u:" + secret + "@a:4222"}}, `"…@a:4222"`},
		"other scheme":       {natslink.Config{URLs: []string{"http://u:" + secret + "@a:4222"}}, "nats, tls, ws or wss"},
		"no host":            {natslink.Config{URLs: []string{"nats://:4222"}}, "host is missing"},
		"colon in the host":  {natslink.Config{URLs: []string{"nats://a:1:4222"}}, "no IPv6 address"},
		"port range":         {natslink.Config{URLs: []string{"nats://a:70000"}}, "65535"},
		"port zero":          {natslink.Config{URLs: []string{"nats://a:0"}}, "65535"},
		"odd password":       {natslink.Config{URLs: []string{"nats://u:" + secret + "/@a:4222"}}, "percent-encoded"},
		"odd password 2":     {natslink.Config{URLs: []string{"nats://u:%zz" + secret + "@a:4222"}}, "percent-encoded"},
		"path":               {natslink.Config{URLs: []string{"nats://u:" + secret + "@a:4222/b"}}, "path"},
		"query":              {natslink.Config{URLs: []string{"nats://a:4222?token=" + secret}}, "query"},
		"list":               {natslink.Config{URLs: []string{"nats://a:4222,nats://b:4222"}}, "URL of its own"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := natslink.New(test.config)
			if test.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantError(t, err, discovery.ErrInvalid, test.want)
			if _, err := natslink.New(test.config); err == nil {
				t.Error("New accepted what Validate refused")
			}
		})
	}
}

func TestNothingPrintsSecrets(t *testing.T) {
	t.Parallel()
	config := natslink.Config{URLs: []string{"nats://" + secret + "@a", "nats://u:" + secret + "@b:1"}, Options: natsconn.Options{Token: secret, User: "u", Password: secret}}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if got, want := fmt.Sprintf(verb, config), "a:4222,b:1"; got != want {
			t.Errorf("%s prints %q, want %q", verb, got, want)
		}
	}
}

func FuzzParseURL(f *testing.F) {
	f.Add("nats://", "u:", "", "@a:4222/b")
	f.Add("nats://", "u:", "/", "@a")
	f.Add("ws://", "", "", "@[::1]")
	f.Add("", "", "?", "@a")
	f.Fuzz(func(t *testing.T, scheme, before, after, rest string) {
		raw := scheme + before + secret + after + "@" + rest
		if strings.Contains(scheme+rest, secret) {
			return // the secret stands where none belongs
		}
		u, err := natslink.ParseURL(raw)
		if err != nil {
			wantError(t, err, discovery.ErrInvalid)
			return
		}
		if u.Hostname() == "" || u.Port() == "" {
			t.Errorf("ParseURL(%q) = %q without a host or a port", raw, u)
		}
		again, err := natslink.ParseURL(u.String())
		if err != nil || again.Host != u.Host {
			t.Errorf("ParseURL(%q) = %v, %v, want %q again", u, again, err, u)
		}
	})
}
