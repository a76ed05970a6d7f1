package caddydiscovery

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

func TestWarmStart(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	config := `http://127.0.0.1:` + port + ` {
		reverse_proxy {
			dynamic discovery {
				registry memory ` + name + `
				service orders
				sync_timeout 1s
			}
		}
	}`
	dead := service(t, "dead")
	list(t, m, "a", service(t, "a").URL, "service", "orders")
	list(t, m, "dead", dead.URL, "service", "orders")
	dead.Close()
	if err := tryLoad(config); err != nil {
		t.Fatal(err)
	}
	url := "http://127.0.0.1:" + port
	eventually(t, "a serves", func() bool { _, body := get(t, url); return body == "a" })
	if err := caddy.Stop(); err != nil { // which keeps the list
		t.Fatal(err)
	}

	m.Break()
	load(t, config)
	if got := fmt.Sprint(served(t, url)); got != "map[a:6]" {
		t.Errorf("without the registry, served by %s, want the node that is still there", got)
	}
	list(t, m, "b", service(t, "b").URL, "service", "orders")
	m.Expire("a")
	m.Expire("dead")
	m.Restore()
	eventually(t, "the registry knows better", func() bool { return served(t, url)["b"] > 0 })
}

// A registry that is there is worth half of sync_timeout.
func TestWarmStartWaits(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	config := `http://127.0.0.1:` + port + ` {
		reverse_proxy {
			dynamic discovery {
				registry memory ` + name + `
				sync_timeout 30s
			}
		}
	}`
	list(t, m, "a", service(t, "a").URL)
	if err := tryLoad(config); err != nil {
		t.Fatal(err)
	}
	url := "http://127.0.0.1:" + port
	eventually(t, "a serves", func() bool { _, body := get(t, url); return body == "a" })
	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	m.Break()
	m.Expire("a")
	list(t, m, "b", service(t, "b").URL)
	load(t, config)
	answer := make(chan string, 1)
	go func() {
		_, body := get(t, url)
		answer <- body
	}()
	select {
	case body := <-answer:
		t.Fatalf("answered %q at once", body)
	case <-time.After(100 * time.Millisecond):
	}
	m.Restore()
	if body := <-answer; body != "b" {
		t.Errorf("answered %q, want what the registry lists", body)
	}
}

func TestWarmStartOff(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", "http://10.0.0.1:80")
	folder := filepath.Join(caddy.AppDataDir(), "discovery")
	files := func() int {
		entries, err := os.ReadDir(folder)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := files()
	u := source(t, "registry memory "+name+" {\nwarm_start off\n}")
	if err := u.Cleanup(); err != nil {
		t.Fatal(err)
	}
	if files() != before {
		t.Error("a list is kept although that is off")
	}
	u.directory = nil // it is cleaned up again
}

// The name of the file tells registries apart, and nothing about their secrets.
func TestWarmName(t *testing.T) {
	name := func(settings string) string {
		n, err := warmName("m", []byte(settings))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	base := name(`{"urls":["nats://a:4222"],"bucket":"b","ttl":1}`)
	for settings, same := range map[string]bool{
		`{"bucket":"b","urls":["nats://a:4222"]}`:                                            true,
		`{"urls":["nats://u:secret@a:4222"],"bucket":"b"}`:                                   true,
		`{"urls":["nats://a:4222"],"bucket":"b","password":"x","user":"y","token":"z"}`:      true,
		`{"urls":["nats://a:4222"],"bucket":"b","credentials":"f","nkey":"g","tls_key":"k"}`: true,
		`{"urls":["nats://a:4222"],"bucket":"b","sentinel_password":"x","loss_guard":3}`:     true,
		`{"urls":["nats://a:4222"],"bucket":"c"}`:                                            false,
		`{"urls":["nats://b:4222"],"bucket":"b"}`:                                            false,
		`{"urls":["nats://a:4222"],"bucket":"b","key_prefix":"x."}`:                          false,
		`{"urls":["nats://a:4222"],"bucket":"b","key":"other"}`:                              false,
	} {
		if got := name(settings) == base; got != same {
			t.Errorf("%s: the same name %v, want %v", settings, got, same)
		}
	}
	if strings.ContainsAny(base, "/\\.:") || len(base) != 32 {
		t.Errorf("the name is %q", base)
	}
}
