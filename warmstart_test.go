package caddydiscovery

import (
	"fmt"
	"os"
	"path/filepath"
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
