package caddydiscovery

import (
	"fmt"
	"strings"
	"testing"

	"go.uber.org/zap"
	logtest "go.uber.org/zap/zaptest/observer"

	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

func TestStaticFallback(t *testing.T) {
	name, m := newMemory(t)
	port := freeport.String(t)
	static := service(t, "static")
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy `+static.URL+` {
			dynamic discovery {
				registry memory `+name+` {
					loss_guard off
				}
			}
		}
	}`)
	url := "http://127.0.0.1:" + port
	if got := fmt.Sprint(served(t, url)); got != "map[static:6]" {
		t.Errorf("an empty fleet is served by %s, want the static upstream", got)
	}
	list(t, m, "a", service(t, "a").URL)
	eventually(t, "a takes over", func() bool { return fmt.Sprint(served(t, url)) == "map[a:6]" })
	m.Expire("a")
	eventually(t, "the static upstream takes over", func() bool { return fmt.Sprint(served(t, url)) == "map[static:6]" })
}

// TestStaticFallbackBehindMulti has two sources under multi, and static upstreams for
// when neither of them has a node.
func TestStaticFallbackBehindMulti(t *testing.T) {
	for _, options := range []string{"", "pick 1", "service {header.X-Service}", "health {\nuri /\n}"} {
		for _, rest := range []string{"", "lb_retries 2", "lb_policy least_load", "fail_duration 1h"} {
			t.Run(strings.NewReplacer("{", "", "}", "").Replace(options+" "+rest), func(t *testing.T) {
				name, m := newMemory(t)
				other := discoverytest.NewMemory()
				memories.Store(name+"-other", other)
				defer memories.Delete(name + "-other")
				port := freeport.String(t)
				static := service(t, "static")
				load(t, `http://127.0.0.1:`+port+` {
					reverse_proxy `+static.URL+` {
						dynamic multi {
							discovery {
								registry memory `+name+` {
					loss_guard off
				}
								`+options+`
							}
							discovery {
								registry memory `+name+`-other {
					loss_guard off
				}
								`+options+`
							}
						}
						`+rest+`
					}
				}`)
				url := "http://127.0.0.1:" + port
				if got := fmt.Sprint(served(t, url, "X-Service", "orders")); got != "map[static:6]" {
					t.Errorf("two empty fleets are served by %s, want the static upstream", got)
				}
				for id, registry := range map[string]*discoverytest.Memory{"a": m, "b": other} {
					list(t, registry, id, service(t, id).URL, "service", "orders")
					eventually(t, id+" takes over", func() bool {
						return fmt.Sprint(served(t, url, "X-Service", "orders")) == "map["+id+":6]"
					})
					registry.Expire(id)
					eventually(t, "the static upstream takes over", func() bool {
						return fmt.Sprint(served(t, url, "X-Service", "orders")) == "map[static:6]"
					})
				}
			})
		}
	}
}

func TestMulti(t *testing.T) {
	name, m := newMemory(t)
	other := discoverytest.NewMemory()
	memories.Store(name+"-other", other)
	defer memories.Delete(name + "-other")
	port := freeport.String(t)
	load(t, `http://127.0.0.1:`+port+` {
		reverse_proxy {
			dynamic multi {
				discovery {
					registry memory `+name+`
				}
				discovery {
					registry memory `+name+`-other
				}
			}
			lb_policy first
		}
	}`)
	url := "http://127.0.0.1:" + port
	list(t, other, "b", service(t, "b").URL)
	eventually(t, "the second source serves while the first is empty", func() bool { return fmt.Sprint(served(t, url)) == "map[b:6]" })
	list(t, m, "a", service(t, "a").URL)
	eventually(t, "the first source comes first", func() bool { return fmt.Sprint(served(t, url)) == "map[a:6]" })
}

// TestLinesOfAFlappingNode holds that the only node of a source, which comes and goes as
// fast as it can, does not fill the log.
func TestLinesOfAFlappingNode(t *testing.T) {
	name, _ := newMemory(t)
	u := source(t, "registry memory "+name)
	core, logs := logtest.New(zap.InfoLevel)
	u.logger = zap.New(core)
	for range 100 * turnRate {
		u.onBuilt(u.directory.Snapshot(), new(picker.Picker), true)
	}
	if n := logs.FilterMessage("no node can serve").Len(); n == 0 || n >= 50*turnRate {
		t.Errorf("%d lines, want %d and a few", n, turnRate)
	}
}
