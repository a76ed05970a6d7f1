package natskv_test

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
)

func TestResolve(t *testing.T) {
	t.Parallel()
	defaults := natskv.Config{
		URLs: []string{"nats://127.0.0.1:4222"}, Bucket: "catga_nodes", KeyPrefix: "node.",
		BucketTTL: 5 * time.Minute, History: 10, MaxBytes: 10 << 20, Storage: "file",
	}
	orders := defaults
	orders.Bucket = "orders"
	for name, test := range map[string]struct{ config, want natskv.Config }{
		"nothing":           {natskv.Config{}, defaults},
		"default port":      {natskv.Config{URLs: []string{"nats://127.0.0.1"}}, defaults},
		"slash":             {natskv.Config{URLs: []string{"nats://127.0.0.1/"}}, defaults},
		"bucket in URL":     {natskv.Config{URLs: []string{"nats://127.0.0.1:4222/orders"}}, orders},
		"bucket in both":    {natskv.Config{URLs: []string{"nats://127.0.0.1:4222/orders"}, Bucket: "orders"}, orders},
		"bucket in options": {natskv.Config{Bucket: "orders"}, orders},
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
	for name, test := range map[string]struct {
		config natskv.Config
		words  []string
	}{
		"two buckets":       {natskv.Config{URLs: []string{"nats://u:" + secret + "@a/b"}, Bucket: "c"}, []string{`"b"`, `"c"`}},
		"two URLs' buckets": {natskv.Config{URLs: []string{"nats://a/b", "nats://a/c"}}, []string{`"b"`, `"c"`}},
		"bucket":            {natskv.Config{Bucket: "a.b"}, []string{"bucket", `"a.b"`, "letters"}},
		"bucket path":       {natskv.Config{URLs: []string{"nats://a/b/c"}}, []string{"bucket", "letters"}},
		"scheme":            {natskv.Config{URLs: []string{"redis://" + secret + "@a"}}, []string{"nats, tls, ws or wss"}},
		"two logins":        {natskv.Config{Conn: natsconn.Options{Token: secret, NKey: "f"}}, []string{"nkey and token"}},
		"key prefix":        {natskv.Config{KeyPrefix: "a b"}, []string{"key prefix", `"a b"`}},
		"key prefix dot":    {natskv.Config{KeyPrefix: "."}, []string{"key prefix"}},
		"domain":            {natskv.Config{Domain: "a.b"}, []string{"domain", `"a.b"`}},
		"ttl":               {natskv.Config{BucketTTL: time.Millisecond}, []string{"bucket TTL", "at least 1s"}},
		"history":           {natskv.Config{History: 65}, []string{"history", "64"}},
		"max bytes":         {natskv.Config{MaxBytes: -2}, []string{"max bytes"}},
		"storage":           {natskv.Config{Storage: "tape"}, []string{"storage", "file or memory"}},
		"replicas":          {natskv.Config{Replicas: 6}, []string{"replicas", "1 to 5"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := test.config.Resolve()
			wantError(t, err, discovery.ErrInvalid, test.words...)
			if _, err := natskv.Open(test.config); !errors.Is(err, discovery.ErrInvalid) {
				t.Errorf("Open returned %v", err)
			}
		})
	}
}

func TestString(t *testing.T) {
	t.Parallel()
	config := natskv.Config{
		URLs: []string{"nats://u:" + secret + "@a/b", "tls://b:1/b"},
	}
	const want = "nats_kv://a:4222,b:1/b"
	r, err := natskv.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	if got := r.String(); got != want {
		t.Errorf("String is %q, want %q", got, want)
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if got := fmt.Sprintf(verb, config); got != want {
			t.Errorf("%s prints %q, want %q", verb, got, want)
		}
	}
	if strings.Contains(fmt.Sprint(r), secret) {
		t.Error("the secret is shown")
	}
}
