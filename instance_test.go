package caddydiscovery

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// A config that is only validated leaves no instance ID behind, and one that runs
// keeps that by which it is known.
//
// The cleaning of Caddy's storage is off: it asks for the ID in the background, as
// soon as the TLS app starts, and may be the first to write one.
func TestInstanceID(t *testing.T) {
	t.Setenv("XDG_DATA_HOME", t.TempDir())
	name, _ := newMemory(t)
	config := `{
		admin off
		persist_config off
		storage_clean_interval off
		registrar {
			registry memory ` + name + `
		}
	}
	http://127.0.0.1:` + freeport.String(t) + ` {
		reverse_proxy {
			dynamic discovery {
				registry memory ` + name + `
				subset 3
			}
		}
	}`
	if err := validate(config); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(instanceFile()); err == nil {
		t.Error("validating wrote the instance ID")
	}
	before, err := instanceID()
	if err != nil {
		t.Fatal(err)
	}
	load(t, config)
	kept, err := caddy.InstanceID()
	if err != nil || kept.String() != before {
		t.Errorf("the instance ID is %v, was %s: %v", kept, before, err)
	}
	if after, err := instanceID(); after != before {
		t.Errorf("the instance ID was %s and is %s: %v", before, after, err)
	}
}

// A data directory that cannot be written is tried once by each config that starts,
// and by no request. The ID stays as it is, so that the proxy keeps its name.
func TestInstanceIDNotWritable(t *testing.T) {
	// Root may write anywhere, but not into what a dangling link stands for.
	data := filepath.Join(t.TempDir(), "data")
	if err := os.Symlink("nowhere", data); err != nil {
		t.Fatal(err)
	}
	t.Setenv("XDG_DATA_HOME", data)
	instanceIDs.Lock()
	instanceIDs.handedOut[instanceFile()] = &handedOutID{id: "to be kept"}
	instanceIDs.Unlock()
	keepInstanceID()
	settleInstanceID()
	if got, err := instanceID(); got != "to be kept" {
		t.Errorf("the instance ID became %s: %v", got, err)
	}

	name, m := newMemory(t)
	list(t, m, "a", at("a"))
	u := source(t, "registry memory "+name)
	instanceIDs.Lock()
	defer instanceIDs.Unlock()
	answered := make(chan int, 1)
	go func() {
		upstreams, _ := u.GetUpstreams(request())
		answered <- len(upstreams)
	}()
	select {
	case n := <-answered:
		if n != 1 {
			t.Errorf("looked up %d nodes", n)
		}
	case <-time.After(patience):
		t.Error("a request waits for who looks at the data directory")
	}
}

// Caddy's TLS app makes an ID up while the config starts for which one was handed out. It
// empties the file before it writes into it, at any time until then. The one that was handed
// out stays, in this process and after it.
func TestInstanceIDBesideCaddysOwn(t *testing.T) {
	const other = "7b0f5b1e-6a6f-4f0e-9a53-0f1f5a1f2b3c"
	t.Setenv("XDG_DATA_HOME", t.TempDir())
	write := func(content string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(instanceFile()), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(instanceFile(), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(want, when string) {
		t.Helper()
		if got, err := instanceID(); got != want {
			t.Errorf("%s the instance ID is %s, want %s: %v", when, got, want, err)
		}
	}
	before, err := instanceID()
	if err != nil {
		t.Fatal(err)
	}
	settleInstanceID() // a config that was only validated ends
	if _, err := os.Stat(instanceFile()); err == nil {
		t.Error("the end of a validated config wrote the instance ID")
	}
	write(other)
	expect(before, "with another one on disk")
	keepInstanceID()
	write("")
	expect(before, "while another one is written")
	write(other)
	settleInstanceID()
	expect(before, "at the end")
	if kept, err := caddy.InstanceID(); err != nil || kept.String() != before {
		t.Errorf("on disk is %v, want %s: %v", kept, before, err)
	}
	if files, err := os.ReadDir(filepath.Dir(instanceFile())); err != nil || len(files) != 1 {
		t.Errorf("what was written on the way is left: %v, %v", files, err)
	}
	write(other) // by hand
	expect(other, "after that")

	// What a crash left empty is none.
	write("")
	healed, err := instanceID()
	if err != nil {
		t.Fatal(err)
	}
	keepInstanceID()
	if kept, err := caddy.InstanceID(); err != nil || kept.String() != healed {
		t.Errorf("on disk is %v, want %s: %v", kept, healed, err)
	}
	settleInstanceID()

	// What another process is writing counts as soon as it is there.
	synctest.Test(t, func(t *testing.T) {
		write("")
		go func() {
			time.Sleep(emptyPause * 3 / 2)
			write(other)
		}()
		expect(other, "written meanwhile")
	})
}

// TestDefaultNodeID tells two Caddys apart that share a host and a data directory,
// and gives each the same name again when it is started again.
func TestDefaultNodeID(t *testing.T) {
	ids := make(map[string]string)
	for what, servers := range map[string][]listener{
		"no server":         nil,
		"everywhere":        {{"http", "", 8080}},
		"another port":      {{"http", "", 8081}},
		"one address":       {{"http", "10.0.0.1", 8080}},
		"another address":   {{"http", "10.0.0.2", 8080}},
		"an IPv6 address":   {{"http", "2001:db8::1", 8080}},
		"several, and last": {{"http", "", 8082}, {"http", "", 8080}},
	} {
		id := defaultNodeID(servers)
		if err := discovery.ValidateID(id); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if other, taken := ids[id]; taken {
			t.Errorf("%s and %s have the id %s", what, other, id)
		}
		ids[id] = what
		if again := defaultNodeID(servers); again != id {
			t.Errorf("%s: %s, and then %s", what, id, again)
		}
	}
	for _, unspecified := range []string{"0.0.0.0", "::"} {
		if a, b := defaultNodeID([]listener{{"http", unspecified, 8080}}), defaultNodeID([]listener{{"http", "", 8080}}); a != b {
			t.Errorf("%s is everywhere, and named %s, not %s", unspecified, a, b)
		}
	}

	// So it is for the proxies of a subset, which are provisioned before the app that
	// listens is.
	proxies := make(map[string]bool)
	for range 2 {
		name, _ := newMemory(t)
		port := freeport.String(t)
		load(t, "http://127.0.0.1:"+port+" {\nreverse_proxy {\ndynamic discovery {\nregistry memory "+name+"\nsubset 2\n}\n}\n}")
		id := runningSource(t).ProxyID
		if !strings.HasSuffix(id, "-"+port) {
			t.Errorf("the proxy that listens on port %s is %s", port, id)
		}
		proxies[id] = true
	}
	if len(proxies) != 2 {
		t.Errorf("two proxies are %v", proxies)
	}
}
