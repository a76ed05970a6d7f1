package caddydiscovery

import (
	"fmt"
	"strings"
	"testing"
)

// literalConfigs are Caddyfiles around lines of each block, which begin in the line
// with the number.
var literalConfigs = map[string]struct {
	caddyfile string
	line      int
}{
	"source":    {"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery nats://h {\n#\n\t\t}\n\t}\n}", 4},
	"line":      {"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery #\n\t}\n}", 3},
	"health":    {"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery nats://h {\n\t\t\thealth {\n#\n\t\t\t}\n\t\t}\n\t}\n}", 5},
	"nats_kv":   {"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery {\n\t\t\tregistry nats_kv {\n#\n\t\t\t}\n\t\t}\n\t}\n}", 5},
	"nats":      {"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery {\n\t\t\tregistry nats {\n#\n\t\t\t}\n\t\t}\n\t}\n}", 5},
	"redis":     {"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery {\n\t\t\tregistry redis {\n#\n\t\t\t}\n\t\t}\n\t}\n}", 5},
	"backend":   {"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery {\n\t\t\tregistry #\n\t\t}\n\t}\n}", 4},
	"registrar": {"{\n\tregistrar nats://h {\n#\n\t}\n}", 3},
	"status":    {"http://:9 {\n\tdiscovery_status {\n#\n\t}\n}", 3},
}

// TestLiterals holds that a value which no placeholder can change is refused with
// its line when the Caddyfile is read, and that one is accepted which a placeholder
// may make right.
func TestLiterals(t *testing.T) {
	for _, c := range []struct {
		block, lines string
		at           int    // the line of the block that is at fault, from 1; 0: the line is accepted
		want         string // in the error
	}{
		{"source", "pick 2 hash tenant", 1, `hash "tenant" is no placeholder`},
		{"source", "pick 2 hash {client_ip}\nslow_start 1m", 0, ""},
		{"source", "slow_start 1m\npick 2", 0, ""},
		{"source", "proxy_id {env.NOT_SET}\nsubset 3", 0, ""},
		{"source", "proxy_id {nonsense}\nsubset 3", 1, "nonsense"},
		{"source", "subset 3", 0, ""},
		{"source", "service {env.NOT_SET}\nwhere zone {http.vars.x}\nprefer zone {env.ZONE}", 0, ""},

		{"health", "uri healthz", 1, `invalid uri "healthz"`},
		{"health", "interval 1s\nuri healthz\nfails 2", 2, `invalid uri "healthz"`},
		{"health", "uri {env.PATH_OF_IT}", 1, "invalid uri"}, // it is no option with placeholders
		{"health", `header "a b" c`, 1, "invalid name"},
		{"health", "header X-A {env.NOT_SET}", 0, ""},
		{"health", "header X-A {nonsense}", 1, "nonsense"},

		{"line", "nats://h/a.b", 1, `"a.b"`},
		{"line", "nats://h:99999", 1, "port"},
		{"line", "nats://", 1, "host is missing"},
		{"line", "nats://h?x=1", 1, "query"},
		{"line", "ftp://h", 1, "does not name a backend by its scheme"},
		{"line", "NATS://h", 0, ""},
		{"line", "REDIS://h", 0, ""},
		{"line", "redis://h/x", 1, "the database, a number"},
		{"line", "redis://h redis://i", 1, "a single server has one"},
		{"line", "redis+sentinel://h redis+sentinel://i", 0, ""},
		{"line", "nats://{env.USER_NAME}:{env.NOT_SET}@{env.HOST_NAME}:{env.PORT}/{env.BUCKET}", 0, ""},
		{"line", "redis://:{file./run/secrets/redis}@h/{env.DB}", 0, ""},

		{"backend", "nats_kv redis://h", 1, "scheme"},
		{"backend", "nats http://h", 1, "scheme"},
		{"backend", "redis nats://h", 1, "scheme"},
		{"backend", "nats_kv {env.URLS}", 0, ""},
		{"backend", "nats_kv {env.URL} {\nbucket a.b\n}", 2, `bucket "a.b"`},
		{"backend", "redis {env.URL} {\nsentinel_master m\n}", 0, ""},
		{"backend", "redis {env.URL} {\ndb 3\n}", 0, ""},

		{"nats_kv", "bucket a.b", 1, `bucket "a.b"`},
		{"nats_kv", "history 3\nbucket a.b\nreplicas 3", 2, `bucket "a.b"`},
		{"nats_kv", "key_prefix .a", 1, "key prefix"},
		{"nats_kv", "bucket_ttl 1ms", 1, "bucket TTL"},
		{"nats_kv", "domain a.b", 1, "domain"},
		{"nats_kv", "token a\nuser b c", 2, "only one of"},
		{"nats_kv", "token {env.NOT_SET}\nuser b {env.NOT_SET}", 0, ""},
		{"nats_kv", "token {nonsense}", 1, "nonsense"},
		{"nats_kv", "bucket {env.NOT_SET}\nkey_prefix {env.NOT_SET}\ndomain {env.NOT_SET}", 0, ""},
		{"nats_kv", "tls_client_auth {file./run/cert} {env.NOT_SET}\ntls_ca /no/such/file", 0, ""},

		{"nats", "subject_prefix a..b", 1, "a..b"},
		{"nats", "subject_prefix {env.NOT_SET}.nodes", 0, ""},
		{"nats", "nkey a\ncredentials b", 2, "only one of"},

		{"redis", "poll 1ms", 1, "poll"},
		{"redis", "sentinel_master m", 1, "need mode sentinel"},
		{"redis", "sentinel_master m\nmode sentinel", 0, ""},
		{"redis", "mode cluster\ndb 3", 2, "a cluster has only database 0"},
		{"redis", "username u", 1, "it needs a password"},
		{"redis", "username u\npassword {env.NOT_SET}", 0, ""},
		{"redis", "username u\npassword {env.NOT_SET}\nsentinel_master {env.NOT_SET}", 3, "need mode sentinel"},

		{"registrar", "endpoint ftp://h:1", 1, "endpoint"},
		{"registrar", "heartbeat 1s\nendpoint http://h:1/path", 2, "endpoint"},
		{"registrar", "endpoint http://{env.NOT_SET}:{env.PORT}\nhealth_url {env.NOT_SET}\nload {env.NOT_SET}", 0, ""},
		{"registrar", "endpoint {env.NOT_SET}", 0, ""},
		{"registrar", "endpoint {nonsense}", 1, "nonsense"},
		{"registrar", "load heavy", 1, `load: invalid value "heavy"`},
		{"registrar", "health_url ftp://h", 1, "health_url"},
		{"registrar", "heartbeat 10s\nttl 5s", 2, "want more than the heartbeat"},
		{"registrar", "ttl 5s\nheartbeat 10s", 1, "want more than the heartbeat"}, // of the default as well
		{"registrar", "ttl 2m\nheartbeat 1m", 0, ""},
		{"registrar", "metadata zone {env.NOT_SET}", 0, ""},
		{"registrar", "node_id {env.NOT_SET}-{system.hostname}", 0, ""},

		{"status", "allow nonsense", 1, `invalid network "nonsense"`},
		{"status", "allow ::1\nallow 10.0.0.0/33", 2, `invalid network "10.0.0.0/33"`},
	} {
		config := literalConfigs[c.block]
		_, err := tryAdapt(strings.Replace(config.caddyfile, "#", c.lines, 1))
		what := c.block + ": " + c.lines
		if c.at == 0 {
			if err != nil {
				t.Errorf("%s: %v", what, err)
			}
			continue
		}
		wantError(t, what, err, c.want, fmt.Sprintf("Caddyfile:%d", config.line+c.at-1))
	}
}
