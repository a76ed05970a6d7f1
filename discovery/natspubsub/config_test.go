package natspubsub_test

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
)

func TestResolve(t *testing.T) {
	t.Parallel()
	defaults := natspubsub.Config{URLs: []string{"nats://127.0.0.1:4222"}, SubjectPrefix: "catga.nodes", Listen: 10 * time.Second}
	mine, tls := defaults, defaults
	mine.SubjectPrefix = "my.prefix"
	tls.URLs = []string{"tls://127.0.0.1:4222"}
	for name, test := range map[string]struct{ config, want natspubsub.Config }{
		"nothing":            {natspubsub.Config{}, defaults},
		"default port":       {natspubsub.Config{URLs: []string{"nats://127.0.0.1"}}, defaults},
		"own scheme":         {natspubsub.Config{URLs: []string{"nats+pubsub://127.0.0.1/"}}, defaults},
		"own scheme in caps": {natspubsub.Config{URLs: []string{"NATS+PubSub://127.0.0.1:4222"}}, defaults},
		"TLS":                {natspubsub.Config{URLs: []string{"tls://127.0.0.1:4222"}}, tls},
		"prefix in URL":      {natspubsub.Config{URLs: []string{"nats+pubsub://127.0.0.1:4222/my.prefix"}}, mine},
		"prefix in both":     {natspubsub.Config{URLs: []string{"nats://127.0.0.1:4222/my.prefix"}, SubjectPrefix: "my.prefix"}, mine},
		"prefix in options":  {natspubsub.Config{SubjectPrefix: "my.prefix"}, mine},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := test.config.Resolve()
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("resolved to %s, want %s", got, test.want)
			}
			again, err := got.Resolve()
			if err != nil || !reflect.DeepEqual(again, got) {
				t.Errorf("resolved again to %s, %v", again, err)
			}
		})
	}
}

func TestResolveRefuses(t *testing.T) {
	t.Parallel()
	prefix := func(prefix string) natspubsub.Config { return natspubsub.Config{SubjectPrefix: prefix} }
	for name, test := range map[string]struct {
		config natspubsub.Config
		words  []string
	}{
		"two prefixes":       {natspubsub.Config{URLs: []string{"nats+pubsub://u:" + secret + "@a/b"}, SubjectPrefix: "c"}, []string{`"b"`, `"c"`}},
		"two URLs' prefixes": {natspubsub.Config{URLs: []string{"nats+pubsub://a/b", "nats://a/c"}}, []string{`"b"`, `"c"`}},
		"scheme":             {natspubsub.Config{URLs: []string{"redis://" + secret + "@a"}}, []string{"nats, tls, ws or wss"}},
		"query":              {natspubsub.Config{URLs: []string{"nats+pubsub://a/b?" + secret}}, []string{"query"}},
		"two logins":         {natspubsub.Config{Conn: natsconn.Options{Token: secret, NKey: "f"}}, []string{"nkey and token"}},
		"star":               {prefix("a.*"), []string{"subject prefix", `"a.*"`}},
		"greater":            {prefix("a.>"), []string{"subject prefix"}},
		"space":              {natspubsub.Config{URLs: []string{"nats+pubsub://a/b%20c"}}, []string{"subject prefix", `"b c"`}},
		"control":            {prefix("a\x00"), []string{"subject prefix"}},
		"no UTF-8":           {prefix("a\xff"), []string{"subject prefix"}},
		"dot at the start":   {prefix(".a"), []string{"subject prefix"}},
		"dot at the end":     {prefix("a."), []string{"subject prefix"}},
		"two dots":           {prefix("a..b"), []string{"subject prefix"}},
		"the server's own":   {prefix("$SYS.a"), []string{"subject prefix", "$"}},
		"inboxes":            {prefix("_INBOX.a"), []string{"subject prefix", "_INBOX"}},
		"long":               {prefix(strings.Repeat("a", 201)), []string{"subject prefix", "200"}},
		"listen":             {natspubsub.Config{Listen: time.Millisecond}, []string{"listen", "100ms"}},
		"listen backwards":   {natspubsub.Config{Listen: -time.Second}, []string{"listen"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := test.config.Resolve()
			wantError(t, err, discovery.ErrInvalid, test.words...)
			if _, err := natspubsub.Open(test.config); !errors.Is(err, discovery.ErrInvalid) {
				t.Errorf("Open returned %v", err)
			}
		})
	}
}

func TestString(t *testing.T) {
	t.Parallel()
	config := natspubsub.Config{
		URLs: []string{"nats+pubsub://u:" + secret + "@a/b.c", "tls://b:1/b.c"},
	}
	const want = "nats+pubsub://a:4222,b:1/b.c"
	if got := open(t, config).String(); got != want {
		t.Errorf("String is %q, want %q", got, want)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if got := fmt.Sprintf(verb, config); got != want {
			t.Errorf("%s prints %q, want %q", verb, got, want)
		}
	}
}
