package caddydiscovery

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

func TestRegistryLossKeepsServing(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "lease", "100ms")
	url := serveNodes(t, name, "", "")
	eventually(t, "a serves", func() bool {
		list(t, m, "a", "http://"+strings.TrimPrefix(service(t, "a").URL, "http://"), "lease", "100ms")
		_, body := get(t, url)
		return body == "a"
	})
	m.Break()
	<-time.After(500 * time.Millisecond) // five leases
	if _, body := get(t, url); body != "a" {
		t.Errorf("answered %q while the registry was away, want the node", body)
	}
}

func TestMaxStale(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	list(t, m, "a", service(t, "a").URL)
	load(t, `http://127.0.0.1:`+port+` {
		handle /unlimited {
			reverse_proxy {
				dynamic discovery {
					registry memory `+name+`
				}
			}
		}
		handle /static {
			reverse_proxy `+service(t, "static").URL+` {
				dynamic discovery {
					registry memory `+name+`
					max_stale 50ms
				}
			}
		}
		handle {
			reverse_proxy {
				dynamic discovery {
					registry memory `+name+`
					max_stale 50ms
				}
			}
		}
	}`)
	url := "http://127.0.0.1:" + port
	answers := func(want string) func() bool {
		return func() bool {
			status, body := get(t, url)
			_, static := get(t, url+"/static")
			_, unlimited := get(t, url+"/unlimited")
			return fmt.Sprint(status, body, " ", static, " ", unlimited) == want
		}
	}
	eventually(t, "a serves", answers("200a a a"))
	m.Break()
	eventually(t, "those that are in a hurry give it up", answers("503 static a"))
	m.Restore()
	eventually(t, "a serves again", answers("200a a a"))
}

// TestSilentRegistryKeepsServing has the registry die without a word: the
// connection stands and nothing comes.
func TestSilentRegistryKeepsServing(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "lease", "500ms")
	url := serveNodes(t, name, "", "")
	if _, body := get(t, url); body != "a" {
		t.Fatalf("answered %q, want the node", body)
	}
	m.Silence(true)
	defer m.Silence(false)
	<-time.After(2 * time.Second) // four leases
	if _, body := get(t, url); body != "a" {
		t.Errorf("answered %q while the registry was silent, want the node", body)
	}
}
