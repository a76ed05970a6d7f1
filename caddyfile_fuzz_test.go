package caddydiscovery

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
)

// fuzzed are the places in a Caddyfile where our directives read a block, each
// with a mark where its lines stand. Whole files would mostly fuzz Caddy's own
// parser.
var fuzzed = []string{
	"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery nats://127.0.0.1 {\n#\n\t\t}\n\t}\n}",
	"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery {\n#\n\t\t}\n\t}\n}",
	"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery #\n\t}\n}",
	"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery {\n\t\t\tregistry nats_kv {\n#\n\t\t\t}\n\t\t}\n\t}\n}",
	"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery {\n\t\t\tregistry nats {\n#\n\t\t\t}\n\t\t}\n\t}\n}",
	"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery {\n\t\t\tregistry redis {\n#\n\t\t\t}\n\t\t}\n\t}\n}",
	"{\n\tregistrar nats://127.0.0.1 {\n#\n\t}\n}",
	"{\n\tregistrar #\n}",
	"http://:9 {\n\tdiscovery_status {\n#\n\t}\n}",
	"http://:9 {\n\treverse_proxy {\n\t\tdynamic multi {\n\t\t\tdiscovery #\n\t\t}\n\t\tlb_policy least_load\n\t}\n}",
	"{\n\tdiscovery {\n\t\tregistry main nats://127.0.0.1 {\n\t\t\thosts a.example.com\n\t\t}\n\t}\n\ton_demand_tls {\n\t\tpermission discovery #\n\t}\n}",
	"http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery nats://h\n\t\tlb_policy least_latency {\n#\n\t\t}\n\t}\n}",
	"#",
}

// FuzzCaddyfile holds that no Caddyfile makes our parsers panic or hang, that it
// means the same each time it is read, and that the JSON it becomes is JSON that
// the modules accept strictly and write again alike.
func FuzzCaddyfile(f *testing.F) {
	files, err := filepath.Glob("testdata/adapt/*.caddyfile")
	if err != nil || len(files) == 0 {
		f.Fatalf("no golden files: %v", err)
	}
	for _, file := range files {
		source, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(byte(len(fuzzed)-1), string(source))
	}
	for place, lines := range []string{
		"service orders\nwhere zone eu-1 eu-2\nprefer zone eu-1\nscheme https\nallow 10.0.0.0/8 *.internal\ndeny private_ranges",
		"registry redis redis+sentinel://h:26379 {\nmode sentinel\nsentinel_master m\n}\npick 2 hash {client_ip}\nsubset 3\nproxy_id x",
		"nats://u:p@h/bucket tls://h2",
		"bucket b\nkey_prefix n.\ncreate off\nbucket_ttl 5m\nhistory 3\nmax_bytes 10MiB\nstorage memory\nreplicas 3\ndomain d\nuser a b",
		"subject_prefix a.b\ninbox_prefix i\ntls_handshake_first on\ntoken t\ntls_ca f\ntls_client_auth c k\ntls_server_name s\nttl 30s\nloss_guard off\nwarm_start off",
		"mode cluster\nkey {tag}:x\nlayout keys\npoll 1s\nhistory 2\nusername u\npassword p\ndb 3\nloss_guard 70%",
		"node_id n\nendpoint https://h:1\nmetadata a b\nmetadata {\nc d\n}\nheartbeat 1s\nttl 5s\nload system\nhealth_url http://h\ndrain 0s",
		"redis://h redis://i {\ndrain 1s\n}\nregistrar nats://h",
		"allow private_ranges 10.0.0.0/8\nmax_streams 3",
		"redis+cluster://h {\nslow_start 1m\nsync_timeout 1s\nmax_stale 1h\nhealth {\nuri /\nport 80\nstatus 2xx\nheader a b\n}\n}",
		"main {\nlinger 1h\nlimit 3 24h\nsync_timeout 1s\n}",
	} {
		f.Add(byte(place), lines)
	}
	f.Fuzz(func(t *testing.T, place byte, lines string) {
		if len(lines) > 4<<10 || strings.Contains(lines, "import") {
			return // Caddy's import reads other files
		}
		source := strings.Replace(fuzzed[int(place)%len(fuzzed)], "#", lines, 1)
		config, err := tryAdapt(source)
		again, againErr := tryAdapt(source)
		if (err == nil) != (againErr == nil) || !bytes.Equal(config, again) {
			t.Fatalf("read twice it is\n%s %v\nand\n%s %v", config, err, again, againErr)
		}
		if err != nil {
			return
		}
		var tree any
		if err := json.Unmarshal(config, &tree); err != nil {
			t.Fatalf("no JSON: %v\n%s", err, config)
		}
		checkModules(t, "", tree)
	})
}

// checkModules decodes every module of ours in a config strictly, and compares
// what it is written as again.
func checkModules(t *testing.T, name string, tree any) {
	t.Helper()
	switch tree := tree.(type) {
	case []any:
		for _, v := range tree {
			checkModules(t, name, v)
		}
	case map[string]any:
		for k, v := range tree {
			checkModules(t, k, v)
		}
		module, key := "", ""
		switch {
		case tree["source"] == "discovery":
			module, key = "http.reverse_proxy.upstreams.discovery", "source"
		case tree["handler"] == "discovery_status":
			module, key = "http.handlers.discovery_status", "handler"
		case tree["policy"] == "least_load", tree["policy"] == "least_latency":
			module, key = "http.reverse_proxy.selection_policies."+tree["policy"].(string), "policy"
		case name == "registry":
			backend, _ := tree["backend"].(string)
			module, key = "discovery.registries."+backend, "backend"
		case name == "registrar":
			module = "registrar"
		default:
			return
		}
		info, err := caddy.GetModule(module)
		if err != nil {
			t.Fatal(err)
		}
		fields := make(map[string]any, len(tree))
		for k, v := range tree {
			if k != key {
				fields[k] = v
			}
		}
		value := info.New()
		if err := caddy.StrictUnmarshalJSON(caddyconfig.JSON(fields, nil), value); err != nil {
			t.Fatalf("%s does not take its own JSON: %v\n%v", module, err, fields)
		}
		var written map[string]any
		if err := json.Unmarshal(caddyconfig.JSON(value, nil), &written); err != nil {
			t.Fatal(err)
		}
		before, after := caddyconfig.JSON(fields, nil), caddyconfig.JSON(written, nil)
		if !bytes.Equal(before, after) {
			t.Errorf("%s was\n%s\nand is written as\n%s", module, before, after)
		}
	}
}
