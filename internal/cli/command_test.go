package cli

import "testing"

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
