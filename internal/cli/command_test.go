package cli

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Secrets on the command line are noticed, and what only names one is not.
func TestExposedSecrets(t *testing.T) {
	for _, c := range []struct {
		urls, options []string
		want          string
	}{
		{nil, nil, ""},
		{[]string{"nats://h:4222/bucket"}, []string{"ttl 1s"}, ""},
		{[]string{"nats://u:p@h"}, nil, "--registry"},
		{[]string{"nats://token@h"}, nil, "--registry"},
		{[]string{"nats://h", "redis://:p@h/0"}, nil, "--registry"},
		{[]string{"nats://u:p%2F@h"}, nil, "--registry"},
		{[]string{"nats://{env.LOGIN}@h"}, nil, ""},
		{[]string{"tls://token@h"}, nil, "--registry"},
		{[]string{"nats://{env.USER}:p@h"}, nil, "--registry"},
		{[]string{"redis://:{env.P}@h"}, nil, ""},
		{[]string{"nats://user:{env.PW}@h", "tls://{env.TOKEN}@h"}, nil, ""},
		{[]string{"redis://alice@h"}, nil, ""},
		{[]string{"redis://alice:@h"}, nil, ""},
		{nil, []string{"password x"}, "--option"},
		{nil, []string{"user a b"}, "--option"},
		{nil, []string{"sentinel_password x"}, "--option"},
		{nil, []string{"token {env.TOKEN}"}, ""},
		{nil, []string{"user a {file./run/secret}"}, ""},
	} {
		f := registryFlags{urls: c.urls, options: c.options}
		if got := f.exposed(); got != c.want {
			t.Errorf("%q %q: a secret in %q, want %q", c.urls, c.options, got, c.want)
		}
	}
}

// The flags become what the block of the backend takes, and no secret is among them.
func TestFlagsAsABlock(t *testing.T) {
	for _, c := range []struct {
		flags   registryFlags
		backend string
		want    string
	}{
		{registryFlags{}, "nats_kv", ""},
		{registryFlags{options: []string{`key_prefix "a b"`, "ttl 1s"}}, "nats_kv", "key_prefix|a b; ttl|1s"},
		{registryFlags{user: "u", passwordEnv: "P"}, "nats_kv", "user|u|{env.P}"},
		{registryFlags{user: "u", passwordFile: "/p"}, "redis", "username|u; password|{file./p}"},
		{registryFlags{user: "u"}, "redis", "username|u"},
		{registryFlags{user: "u"}, "nats", "want both --user and one of --password-env and --password-file"},
		{registryFlags{passwordEnv: "P"}, "nats", "want both --user and one of --password-env and --password-file"},
		{registryFlags{tokenEnv: "T", credentials: "c", nkey: "n"}, "nats", "token|{env.T}; credentials|c; nkey|n"},
		{registryFlags{tlsCA: "ca", tlsCert: "cert", tlsKey: "key", tlsServerName: "h"}, "redis", "tls_ca|ca; tls_client_auth|cert|key; tls_server_name|h"},
	} {
		lines, err := c.flags.lines(c.backend)
		var got []string
		for _, l := range lines {
			got = append(got, strings.Join(l, "|"))
		}
		if err != nil {
			got = []string{err.Error()}
		}
		if got := strings.Join(got, "; "); got != c.want {
			t.Errorf("%s: %q, want %q", c.backend, got, c.want)
		}
	}
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{errors.New("broken"), 1},
		{fmt.Errorf("r keeps no history: %w", discovery.ErrUnsupported), 2},
		{fmt.Errorf("%w: r does not list it", errNoSuchNode), 3},
	} {
		if got := exitCode(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
}

func TestDurationsForPeople(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 1234 * time.Millisecond: "1.2s", 9960 * time.Millisecond: "10s", 61 * time.Second: "1m1s", 11*time.Minute + 31*time.Second: "12m", 2 * time.Hour: "2h0m",
	} {
		if got := age(d); got != want {
			t.Errorf("%v is %s, want %s", d, got, want)
		}
	}
}
