package integration

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// remembering is a site that asks for its last known list after half a second.
func remembering(r registry, port string) string {
	return site(port, r.block("ttl 1h")+"\nsync_timeout 1s", "lb_policy round_robin")
}

// warmFiles returns the last known lists in a data directory.
func warmFiles(t *testing.T, data string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(data, "caddy", "discovery", "*.json"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestWarmStart starts Caddy while its registry is away.
func TestWarmStart(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		fleet := []*service{newService(t, "a"), newService(t, "b")}
		beat := func() {
			for _, s := range fleet {
				r.put(s.id, camel(s.id, "http://"+s.address, ""))
			}
		}
		beat()
		data, port := t.TempDir(), freeport.String(t)
		url := "http://127.0.0.1:" + port
		serve := func(what string, beat func()) {
			t.Helper()
			eventually(t, what, func() bool {
				beat()
				return fmt.Sprint(round(t, len(fleet), url)) == all(fleet)
			})
		}
		p := startOn(t, data, "", remembering(r, port))
		serve("both serve", beat)
		p.kill(syscall.SIGTERM)

		r.stop()
		p = startOn(t, data, "", remembering(r, port))
		serve("the last known nodes serve", func() {})
		if nodes, err := ask("http://" + p.admin + "/discovery/nodes?state=restored"); err != nil || strings.Count(nodes, `"id"`) != 2 {
			t.Errorf("restored: %s, %v", nodes, err)
		}
		// And once more, from what this one left: it has never seen the registry.
		p.kill(syscall.SIGTERM)
		startOn(t, data, "", remembering(r, port))
		serve("the last known nodes serve again", func() {})

		r.restart()
		fleet = append(fleet, newService(t, "c"))
		serve("the registry knows better", beat)
	})
}

// TestDrainOutlivesRestart drains a node and starts Caddy while the registry is away,
// and again when it is back: the node gets no request.
func TestDrainOutlivesRestart(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		if _, broadcast := r.(*broadcast); broadcast {
			t.Log("pub/sub keeps no overrides")
			return
		}
		fleet := []*service{newService(t, "a"), newService(t, "b"), newService(t, "c")}
		beat := func() {
			for _, s := range fleet {
				r.put(s.id, camel(s.id, "http://"+s.address, ""))
			}
		}
		beat()
		if _, stderr, code := runCommand(t, r, "drain", "a", "--option", "ttl 1h"); code != 0 {
			t.Fatalf("drain: %d %s", code, stderr)
		}
		data, port := t.TempDir(), freeport.String(t)
		// serve starts Caddy and asks it from its first moment on, until both of the
		// others have answered a few times.
		serve := func(when string) *proxy {
			t.Helper()
			p := startOn(t, data, "", remembering(r, port))
			answers := make(map[string]int)
			eventually(t, "the others serve "+when, func() bool {
				answer, err := ask("http://127.0.0.1:" + port)
				if err == nil {
					answers[answer]++
				}
				return answers["b"] >= 5 && answers["c"] >= 5
			})
			if answers["a"] > 0 {
				t.Errorf("%s: the drained node got %d of the requests %v", when, answers["a"], answers)
			}
			return p
		}
		p := serve("at first")
		p.kill(syscall.SIGTERM)
		r.stop()
		p = serve("without the registry")
		p.kill(syscall.SIGKILL)
		p = serve("without the registry, after a crash")
		p.kill(syscall.SIGTERM)
		r.restart()
		beat()
		serve("when the registry is back")
		if _, stderr, code := runCommand(t, r, "undrain", "a", "--option", "ttl 1h"); code != 0 {
			t.Fatalf("undrain: %d %s", code, stderr)
		}
		eventually(t, "all serve", func() bool {
			return fmt.Sprint(round(t, len(fleet), "http://127.0.0.1:"+port)) == all(fleet)
		})
	})
}

// resealed changes a warm-start file and gives it the checksum that it needs.
func resealed(change func(string) string) func(string) string {
	return func(text string) string {
		lines := strings.SplitAfter(text, "\n")
		body := change(strings.Join(lines[:len(lines)-2], ""))
		sum := sha256.Sum256([]byte(body))
		return body + `{"sha256":"` + hex.EncodeToString(sum[:]) + "\"}\n"
	}
}

// TestWarmStartSetsAside starts Caddy without its registry and with a last known
// list that is of no use.
func TestWarmStartSetsAside(t *testing.T) {
	header := func(field, value string) func(string) string {
		return func(text string) string {
			return regexp.MustCompile(`"`+field+`":"[^"]*"`).ReplaceAllString(text, `"`+field+`":"`+value+`"`)
		}
	}
	for name, test := range map[string]struct {
		spoil  func(string) string
		reason string
	}{
		"corrupt":             {func(s string) string { return strings.Replace(s, "127.0.0.1", "127.0.0.9", 1) }, "the checksum does not match"},
		"truncated":           {func(s string) string { return s[:len(s)-100] }, "it is cut off"},
		"empty":               {func(string) string { return "" }, "it is cut off"},
		"of another registry": {resealed(header("registry", "another")), "it is of another registry"},
		"too old":             {resealed(header("written", "2025-10-10T12:00:00Z")), "ago, want at most 24h"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newKV(t)
			s := newService(t, "a")
			r.put(s.id, camel(s.id, "http://"+s.address, ""))
			data, port := t.TempDir(), freeport.String(t)
			url := "http://127.0.0.1:" + port
			serves := func() bool { return fmt.Sprint(round(t, 1, url)) == "map[a:1]" }
			p := startOn(t, data, "", remembering(r, port))
			eventually(t, "it serves", serves)
			p.kill(syscall.SIGTERM)

			files := warmFiles(t, data)
			if len(files) != 1 {
				t.Fatalf("the list is kept in %q", files)
			}
			text, err := os.ReadFile(files[0])
			if err != nil {
				t.Fatal(err)
			}
			spoilt := test.spoil(string(text))
			if spoilt == string(text) {
				t.Fatalf("nothing is wrong with %s", text)
			}
			if err := os.WriteFile(files[0], []byte(spoilt), 0o600); err != nil {
				t.Fatal(err)
			}

			r.stop()
			p = startOn(t, data, "", remembering(r, port))
			if answer, err := ask(url); answer != "503" {
				t.Errorf("without registry and list: %s, %v", answer, err)
			}
			var told []string
			for line := range strings.Lines(p.log.String()) {
				if strings.Contains(line, "warm-start") || strings.Contains(line, "set aside") {
					told = append(told, line)
				}
			}
			if len(told) != 1 || !strings.Contains(told[0], test.reason) || !strings.Contains(told[0], filepath.Base(files[0])) {
				t.Errorf("the log says %q, want one line with %q", told, test.reason)
			}
			if aside, err := os.ReadFile(files[0] + ".bad"); err != nil || string(aside) != spoilt {
				t.Errorf("set aside: %q, %v", aside, err)
			}
			r.restart()
			eventually(t, "it serves when the registry is back", serves)
		})
	}
}

// TestWarmStartSideBySide has two Caddys with one data directory.
func TestWarmStartSideBySide(t *testing.T) {
	t.Parallel()
	r := newKV(t)
	s := newService(t, "a")
	r.put(s.id, camel(s.id, "http://"+s.address, ""))
	data := t.TempDir()
	ports := []string{freeport.String(t), freeport.String(t)}
	proxies := make([]*proxy, len(ports))
	launch := func(i int, when string) {
		t.Helper()
		proxies[i] = startOn(t, data, "", remembering(r, ports[i]))
		eventually(t, fmt.Sprint("Caddy ", i, " serves ", when), func() bool {
			return fmt.Sprint(round(t, 1, "http://127.0.0.1:"+ports[i])) == "map[a:1]"
		})
	}
	launch(0, "first")
	launch(1, "beside it")
	eventually(t, "each keeps its list", func() bool { return len(warmFiles(t, data)) == 2 })
	for _, p := range proxies {
		p.kill(syscall.SIGTERM)
	}
	r.stop()
	launch(1, "without the registry")
	launch(0, "without the registry")
	// One restarts while the other has its file.
	proxies[1].kill(syscall.SIGTERM)
	launch(1, "again")
	proxies[0].kill(syscall.SIGKILL)
	launch(0, "after a crash")
	for _, p := range proxies {
		if log := p.log.String(); strings.Contains(log, "set aside") || strings.Contains(log, "not kept") {
			t.Errorf("a list was in the way: %s", log)
		}
	}
}
