package caddydiscovery

import (
	"net/http"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// TestNamedRegistriesShare holds that whoever means the same registry, by its name or
// not, has one connection and one directory, also over a reload that gives it a name.
func TestNamedRegistriesShare(t *testing.T) {
	name, m := newMemory(t)
	list(t, m, "a", service(t, "a").URL, "service", "orders")
	list(t, m, "b", service(t, "b").URL, "service", "pay")
	port := freeport.String(t)
	options := " {\nttl 1m\naddress 127.0.0.1:4222\n}\n"
	site := func(orders, pay string) string {
		return "http://127.0.0.1:" + port + " {\nreverse_proxy /orders {\ndynamic discovery {\n" + orders + "\nservice orders\n}\n}\n" +
			"reverse_proxy /pay {\ndynamic discovery {\n" + pay + "\nservice pay\n}\n}\n}\n"
	}
	unnamed := "registry memory " + name + options
	declared := "{\ndiscovery {\nregistry main memory " + name + options + "}\n}\n"
	var first *sharedDirectory
	for what, config := range map[string]string{
		"by no name":              site(unnamed, unnamed),
		"by its name":             declared + site("registry main", "registry named main"),
		"by its name and without": declared + site("registry main", unnamed),
		"as the only one":         declared + site("", ""),
		"for nobody":              declared + site(unnamed, unnamed),
	} {
		load(t, config)
		for path, want := range map[string]string{"/orders": "a", "/pay": "b"} {
			if status, body := get(t, "http://127.0.0.1:"+port+path); status != http.StatusOK || body != want {
				t.Errorf("%s, %s: %d %q, want %s", what, path, status, body, want)
			}
		}
		running := runningDirectories()
		if first == nil {
			first = running[0]
		}
		if len(running) != 1 || running[0] != first {
			t.Errorf("%s: %d directories, want the one that was there before", what, len(running))
		}
	}
}
