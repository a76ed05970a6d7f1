package registries

import (
	"errors"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestOpen(t *testing.T) {
	for url, want := range map[string]string{
		"NATS://10.0.0.5/fleet":                     "nats_kv://10.0.0.5:4222/fleet",
		"Redis+Cluster://10.0.0.6":                  "redis+cluster://10.0.0.6:6379/",
		"nats://10.0.0.5/fleet":                     "nats_kv://10.0.0.5:4222/fleet",
		"tls://10.0.0.5":                            "nats_kv://10.0.0.5:4222/catga_nodes",
		"nats+pubsub://u:hunter2@10.0.0.5/my.nodes": "nats+pubsub://10.0.0.5:4222/my.nodes",
		"redis://:hunter2@10.0.0.5/2":               "redis://10.0.0.5:6379/2/catga:nodes",
		"redis+cluster://10.0.0.5":                  "redis+cluster://10.0.0.5:6379/",
	} {
		r, err := Open(url)
		if err != nil {
			t.Errorf("%s: %v", url, err)
			continue
		}
		if !strings.HasPrefix(r.String(), want) {
			t.Errorf("%s is %s, want %s", url, r, want)
		}
		if err := r.Close(); err != nil {
			t.Errorf("%s: closing: %v", url, err)
		}
	}
	for _, url := range []string{"", "10.0.0.5:4222", "etcd://u:hunter2@h", "redis://h/x", "nats://h/a.b"} {
		_, err := Open(url)
		if !errors.Is(err, discovery.ErrInvalid) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %v, want ErrInvalid without the password", url, err)
		}
	}
}

// TestRegister holds that a backend of somebody else is opened by its schemes, and
// that nobody takes another's.
func TestRegister(t *testing.T) {
	t.Cleanup(func() { delete(kinds, "file") })
	var opened string
	Register("file", func(url string) (discovery.Registry, error) {
		opened = url
		return nil, errors.ErrUnsupported
	}, "file")
	if _, err := Open("File:///nodes"); !errors.Is(err, errors.ErrUnsupported) || opened != "File:///nodes" {
		t.Errorf("opened %q: %v", opened, err)
	}
	if name, ok := Backend("file:///nodes"); !ok || name != "file" {
		t.Errorf("the URL names %q, %v", name, ok)
	}
	for _, scheme := range []string{"redis", "Up"} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("the scheme %q was registered", scheme)
				}
			}()
			Register("other", nil, scheme)
		}()
	}
}
