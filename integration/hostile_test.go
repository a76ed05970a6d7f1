package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// A trap counts the connections to an address that nobody may dial.
type trap struct {
	address string
	taken   atomic.Int64
}

func newTrap(t *testing.T, address string) *trap {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	p := &trap{address: l.Addr().String()}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			p.taken.Add(1)
			conn.Close()
		}
	}()
	return p
}

func (p *trap) port() string { _, port, _ := net.SplitHostPort(p.address); return port }

// A hostileRecord must not become a node that is used.
type hostileRecord struct {
	id     string
	record string
	reason string // that the admin API must give
	metric string // that it is counted under; "": it is a node, and denied
}

// hostile are the records; traps stand where those that could be dialled lead.
func hostile(r registry, denied, outside, admin, registry, odd *trap) []hostileRecord {
	at := func(id, endpoint string) string { return camel(id, endpoint, `"service":"orders"`) }
	good := "http://" + odd.address
	record := func(fields string) string { return `{"endpoint":"` + good + `",` + fields + `}` }
	many := make([]string, 65)
	for i := range many {
		many[i] = fmt.Sprintf(`"k%d":"v"`, i)
	}
	const injected = `\n{\"level\":\"error\",\"msg\":\"injected\"}\n\u001b[2J`
	records := []hostileRecord{
		{"path", at("path", good+"/admin"), "a path is not accepted", "endpoint"},
		{"user", at("user", "http://u:hunter2@"+odd.address), "user info is not accepted", "endpoint"},
		{"query", at("query", good+"?x"), "a query is not accepted", "endpoint"},
		{"scheme", at("scheme", "ftp://"+odd.address), "the scheme must be", "endpoint"},
		{"unix", at("unix", "unix//run/admin.sock"), "want http://host:port", "endpoint"},
		{"placeholder", at("placeholder", "http://{env.HOME}:"+odd.port()), "placeholders are not accepted", "endpoint"},
		{"range", at("range", odd.address+"-"+odd.port()), "the port must be one number", "endpoint"},
		{"octal", at("octal", "http://0177.0.0115.01:"+odd.port()), "not an IPv4 address in its usual form", "endpoint"},
		{"hex", at("hex", "http://0x7f004d01:"+odd.port()), "not an IPv4 address in its usual form", "endpoint"},
		{"integer", at("integer", "http://2130726145:"+odd.port()), "not an IPv4 address in its usual form", "endpoint"},
		{"short", at("short", "http://127.19713:"+odd.port()), "not an IPv4 address in its usual form", "endpoint"},
		{"zone", at("zone", "http://[fe80::1%25lo]:"+odd.port()), "a zone is not accepted", "endpoint"},
		{"line", `{"nodeId":"line","endpoint":"` + good + injected + `"}`, "only printable ASCII", "endpoint"},
		{"twice", `{"nodeId":"twice","Endpoint":"` + good + `","endpoint":"{x}:1"}`, "placeholders are not accepted", "endpoint"},
		{"negative", record(`"nodeId":"negative","load":-1`), "want a finite number", "load"},
		{"nan", record(`"nodeId":"nan","load":NaN`), "invalid character 'N'", "record"},
		{"infinite", record(`"nodeId":"infinite","load":1e999`), `load "1e999": want a finite number`, "load"},
		{"pairs", camel("pairs", good, strings.Join(many, ",")), "65 pairs", "metadata"},
		{"injection", camel("injection", good, `"note":"x`+injected+`"`), "without control characters", "metadata"},
		{"bidi", camel("bidi", good, `"note":"x\u202ey"`), "without control characters", "metadata"},
		{"evil", record(`"nodeId":"evil` + injected + `"`), "control characters", "id"},
		{"nobody", record(`"nodeId":""`), "node id: it is empty", "id"},
		{"deep", record(`"nodeId":"deep","x":` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000)), "exceeded max depth", "record"},
		{"huge", record(`"nodeId":"huge","x":"` + strings.Repeat("x", 64<<10) + `"`), "want at most 65536", "record"},
		{"cut", `{"nodeId":"cut","endpoint":"`, "unexpected end of JSON input", "record"},
		{"array", `[{"nodeId":"array"}]`, "want a JSON object", "record"},
		{"bytes", record("\"nodeId\":\"a\xffb\""), "it is not UTF-8", "record"},

		{"denied", at("denied", "http://"+denied.address), "denied: by deny 127.0.66.0/24", ""},
		{"mapped", at("mapped", "http://[::ffff:127.0.66.1]:"+denied.port()), "denied: by deny 127.0.66.0/24", ""},
		{"nat64", at("nat64", "http://[64:ff9b::127.0.66.1]:"+denied.port()), "denied: by deny 127.0.66.0/24", ""},
		{"outside", at("outside", "http://"+outside.address), "denied: not in allow", ""},
		{"admin", at("admin", "http://"+admin.address), "denied: Caddy's admin port", ""},
		{"named", at("named", "http://localhost:"+admin.port()), "denied: ", ""},
		{"registry", at("registry", "http://"+registry.address), "denied: the registry itself", ""},
		{"cloud", at("cloud", "http://169.254.169.254"), "denied: link-local", ""},
		{"nowhere", at("nowhere", "http://0.0.0.0:"+odd.port()), "denied: unspecified", ""},
	}
	// In a sorted set a record has no key, and whoever may write it any node.
	if _, set := r.(*sortedSet); !set {
		records = append(records, hostileRecord{"mallory", at("good", good), `the key names another node, "mallory"`, "key"})
	}
	return records
}

// flood writes many records that are none, as fast as the registry takes them.
func flood(t *testing.T, r registry, n int) {
	t.Helper()
	ctx := context.Background()
	pipeline := func(r redisServer, add func(p goredis.Pipeliner, i int)) {
		t.Helper()
		for i := 0; i < n; i += 1000 {
			_, err := r.client.Pipelined(ctx, func(p goredis.Pipeliner) error {
				for j := range 1000 {
					add(p, i+j)
				}
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	junk := func(i int) string { return fmt.Sprintf(`{"nodeId":"junk-%d","endpoint":"junk"}`, i) }
	switch r := r.(type) {
	case *kv:
		js := r.server.JetStream()
		for i := range n {
			if _, err := js.PublishAsync(fmt.Sprint("$KV.catga_nodes.node.junk-", i), []byte(junk(i))); err != nil {
				t.Fatal(err)
			}
			if i%1000 != 999 {
				continue // more would be too many on their way
			}
			select {
			case <-js.PublishAsyncComplete():
			case <-time.After(patience):
				t.Fatal("the bucket does not take the flood")
			}
		}
	case *sortedSet:
		score := float64(time.Now().UnixMilli())
		pipeline(r.redisServer, func(p goredis.Pipeliner, i int) { p.ZAdd(ctx, setKey, goredis.Z{Score: score, Member: junk(i)}) })
	case *keys:
		pipeline(r.redisServer, func(p goredis.Pipeliner, i int) {
			p.Set(ctx, fmt.Sprint(setKey, ":junk-", i), junk(i), 2*time.Minute)
		})
	}
}

// TestHostileRecords puts records beside a good node that would lead the proxy
// astray, under load and with health checks.
func TestHostileRecords(t *testing.T) {
	for _, kind := range registries {
		if kind.name == "nats" {
			continue // nothing is kept there
		}
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			testHostileRecords(t, kind.start(t))
		})
	}
}

func testHostileRecords(t *testing.T, r registry) {
	server, err := url.Parse(r.flags()[1])
	if err != nil {
		t.Fatal(err)
	}
	s := newService(t, "good")
	r.put("good", camel("good", "http://"+s.address, `"service":"orders"`))
	port := freeport.String(t)
	p := start(t, "metrics", site(port, r.block("ttl 1h")+
		"\nallow 127.0.0.0/16\ndeny 127.0.66.0/24\nhealth {\nuri /\ninterval 200ms\n}", "lb_policy round_robin"))
	_, adminPort, _ := net.SplitHostPort(p.admin)
	traps := map[string]*trap{
		"deny": newTrap(t, "127.0.66.1:0"), "outside of allow": newTrap(t, "127.1.0.1:0"), "the admin port": newTrap(t, "127.0.0.2:"+adminPort),
		"the registry's port": newTrap(t, "127.0.0.2:"+server.Port()), "rejected records": newTrap(t, "127.0.77.1:0"),
	}
	records := hostile(r, traps["deny"], traps["outside of allow"], traps["the admin port"], traps["the registry's port"], traps["rejected records"])
	put := func(records []hostileRecord) {
		for _, h := range records {
			r.put(h.id, h.record)
		}
	}
	url := "http://127.0.0.1:" + port
	eventually(t, "the good node serves", func() bool { return fmt.Sprint(round(t, 1, url)) == "map[good:1]" })
	l := steady(t, url, time.Millisecond)
	put(records)

	// A view of a node, or of a rejection.
	type view struct {
		ID, State, Reason string
		Sources           []struct {
			Eligible bool
			Reason   string
		}
	}
	look := func(query string) (views []view) {
		t.Helper()
		body, err := ask("http://" + p.admin + "/discovery/nodes" + query)
		if err != nil || json.Unmarshal([]byte(body), &views) != nil {
			t.Fatalf("nodes: %s, %v", body, err)
		}
		if strings.Contains(body, "hunter2") {
			t.Errorf("a password is told: %s", body)
		}
		return views
	}
	rejected := 0
	for _, h := range records {
		if h.metric != "" {
			rejected++
		}
	}
	explained := func(h hostileRecord) bool {
		for _, v := range look("") {
			switch {
			case h.metric != "" && v.State == "rejected" && strings.Contains(v.Reason, h.reason):
				// Where a record has no key, what cannot be read has no name.
				if _, set := r.(*sortedSet); set || v.ID == h.id {
					return true
				}
			case h.metric == "" && v.ID == h.id && len(v.Sources) == 1 && !v.Sources[0].Eligible && strings.HasPrefix(v.Sources[0].Reason, h.reason):
				return true
			}
		}
		return false
	}
	for _, h := range records {
		eventually(t, fmt.Sprintf("%s is refused: %s", h.id, h.reason), func() bool { return explained(h) })
	}
	if n := len(look("?state=rejected")); n != rejected {
		t.Errorf("%d records are rejected, want %d: %+v", n, rejected, look("?state=rejected"))
	}
	want := make(map[string]int)
	for _, h := range records {
		if h.metric != "" {
			want[h.metric]++
		}
	}
	metrics, err := ask("http://" + p.admin + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	counted := make(map[string]int)
	for _, m := range regexp.MustCompile(`caddy_discovery_rejected_records_total\{reason="(\w+)",[^}]*\} ([1-9]\d*)`).FindAllStringSubmatch(metrics, -1) {
		counted[m[1]], _ = strconv.Atoi(m[2])
	}
	if fmt.Sprint(counted) != fmt.Sprint(want) {
		t.Errorf("counted %v, want %v", counted, want)
	}

	// One writer's flood leaves traffic and the view of others alone.
	l.mark()
	const junk = 100_000
	flood(t, r, junk)
	eventually(t, "the flood has reached Caddy", func() bool { return len(look("?state=rejected")) == 1000 })
	other := newService(t, "other")
	r.put("other", camel("other", "http://"+other.address, `"service":"orders"`))
	// A foreign key in Redis is found by a scan that leaves the server most of its time.
	within(t, 4*patience, "a node that joins is served", func() bool { return l.sinceMark()["other"] > 10 })
	put(records)
	l.mark()
	eventually(t, "requests go on", func() bool { return l.sinceMark()["good"] > 100 && l.sinceMark()["other"] > 100 })
	for _, v := range look("") {
		if good := v.ID == "good" || v.ID == "other"; good != (len(v.Sources) == 1 && v.Sources[0].Eligible) {
			t.Errorf("%+v", v)
		}
	}
	l.stop(t)
	if l.answers["good"] == 0 || l.answers["other"] == 0 || len(l.answers) != 2 {
		t.Errorf("answered by %v", l.answers)
	}
	for name, trap := range traps {
		if n := trap.taken.Load(); n > 0 {
			t.Errorf("%s: %s was dialled %d times", name, trap.address, n)
		}
	}

	lines := 0
	for line := range strings.Lines(p.log.String()) {
		lines++
		line = strings.TrimSuffix(line, "\n")
		var entry struct{ Msg string }
		if strings.Contains(line, "hunter2") || strings.ContainsFunc(line, func(r rune) bool { return r != ' ' && !unicode.IsPrint(r) }) {
			t.Errorf("the log says %q", line)
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry.Msg == "injected" {
			t.Errorf("the log says %q: %v", line, err)
		}
	}
	if lines > 500 {
		t.Errorf("%d lines in the log", lines)
	}
}
