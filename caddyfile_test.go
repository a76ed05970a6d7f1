package caddydiscovery

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files of TestAdapt anew")

// TestAdapt holds the JSON of each Caddyfile in testdata/adapt against the file
// beside it, and provisions it.
func TestAdapt(t *testing.T) {
	t.Setenv("DISCOVERY_TEST_SECRET", "s3cret")
	t.Setenv("DISCOVERY_TEST_HOST", "env.example.com")
	files, err := filepath.Glob("testdata/adapt/*.caddyfile")
	if err != nil || len(files) == 0 {
		t.Fatalf("no golden files: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			source, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			config := adapt(t, string(source))
			var indented bytes.Buffer
			if err := json.Indent(&indented, config, "", "\t"); err != nil {
				t.Fatal(err)
			}
			indented.WriteByte('\n')
			golden := strings.TrimSuffix(file, ".caddyfile") + ".json"
			if *update {
				if err := os.WriteFile(golden, indented.Bytes(), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(indented.Bytes(), want) {
				t.Errorf("adapted to\n%s\nwant\n%s", indented.Bytes(), want)
			}
			if err := validate(string(source)); err != nil {
				t.Errorf("the adapted config does not provision: %v", err)
			}
		})
	}
}

func wantError(t *testing.T, what string, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Errorf("%s: accepted, want an error with %q", what, parts)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%s: the error is\n\t%v\nwant it to say %q", what, err, part)
		}
	}
}

// TestCaddyfileErrors holds that a mistake in each option is named with file and line,
// the option, and what would be accepted. What goes for all options is tested in
// package caddyblock.
func TestCaddyfileErrors(t *testing.T) {
	source := func(block string) string {
		return "http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery nats://127.0.0.1:4222 {\n" + block + "\n\t\t}\n\t}\n}"
	}
	bare := func(head string) string {
		return "http://:9 {\n\treverse_proxy {\n\t\tdynamic discovery " + head + "\n\t}\n}"
	}
	registry := func(block string) string {
		return bare("{\nregistry nats_kv nats://127.0.0.1:4222 {\n" + block + "\n}\n}")
	}
	declared := func(lines string) string { return "{\n\tdiscovery {\n" + lines + "\n\t}\n}" }
	registrar := func(block string) string { return "{\n\tregistrar nats://127.0.0.1:4222 {\n" + block + "\n\t}\n}" }
	for name, c := range map[string]struct {
		caddyfile string
		want      []string
	}{
		"unknown option":           {source("servise orders"), []string{`unknown option "servise"`, "want one of", "route, scheme, service", "Caddyfile:4"}},
		"no argument":              {source("service"), []string{"option service", "want: service <name>", "Caddyfile:4"}},
		"where without values":     {source("where zone"), []string{"option where", "want: where <key> <value...>", "Caddyfile:4"}},
		"where with no key":        {source(`where "" x`), []string{"option where", "the key is empty"}},
		"bad scheme":               {source("scheme ftp"), []string{"option scheme", `"ftp"`, "auto|http|https", "Caddyfile:4"}},
		"allow nothing":            {source("allow"), []string{"option allow", "want: allow <cidr|private_ranges|host-glob...>", "Caddyfile:4"}},
		"allow a URL":              {source("allow http://10.0.0.1"), []string{"option allow", `"http://10.0.0.1"`, "10.0.0.0/8", "*.example.com", "Caddyfile:4"}},
		"deny a bad range":         {source("deny 10.0.0.0/33"), []string{"option deny", `"10.0.0.0/33"`}},
		"deny addresses":           {source("deny 10.0.*"), []string{"option deny", `"10.0.*"`, "10.0.0.0/8"}},
		"bad duration":             {source("sync_timeout soon"), []string{"option sync_timeout", `"soon"`, "such as 500ms", "Caddyfile:4"}},
		"bad max_stale":            {source("max_stale never"), []string{"option max_stale", `"never"`, "such as 500ms", "Caddyfile:4"}},
		"pick of nothing":          {source("pick 0"), []string{"option pick", `"0"`, "1 to 1000", "Caddyfile:4"}},
		"pick without number":      {source("pick"), []string{"option pick", "want: pick <n> [hash <placeholder>]"}},
		"pick by a wrong word":     {source("pick 2 by {client_ip}"), []string{"option pick", `"by"`, "hash <placeholder>"}},
		"pick hash of nothing":     {source("pick 2 hash"), []string{"option pick", "hash needs a placeholder", "Caddyfile:4"}},
		"pick twice":               {source("pick 2\npick 2 hash {client_ip}"), []string{"option pick is given twice", "Caddyfile:5"}},
		"bad subset":               {source("subset -1"), []string{"option subset", `"-1"`, "1 to 100000"}},
		"no proxy_id":              {source("proxy_id"), []string{"option proxy_id", "want: proxy_id <id>"}},
		"bad slow_start":           {source("pick 2\nslow_start slowly"), []string{"option slow_start", `"slowly"`, "such as 500ms", "Caddyfile:5"}},
		"sticky: bad cookie":       {source("sticky s,id"), []string{"sticky", `"s,id"`, "letters, digits", "Caddyfile:4"}},
		"sticky: too much":         {source("sticky sid hunter2 x"), []string{"option sticky", "want: sticky [<cookie> [<secret>]]", "Caddyfile:4"}},
		"sticky: unknown option":   {source("sticky {\ncokie sid\n}"), []string{"sticky", `unknown option "cokie"`, "cookie, lost, max_age, secret", "Caddyfile:5"}},
		"sticky: cookie twice":     {source("sticky sid {\ncookie sid\n}"), []string{"sticky", "cookie", "Caddyfile:5"}},
		"sticky: empty secret":     {source("sticky {\nsecret \"\"\n}"), []string{"option secret", "{file./run/secrets/sticky}", "Caddyfile:5"}},
		"sticky: lost":             {source("sticky {\nsecret hunter2\nlost 200\n}"), []string{"option lost", `"200"`, "repick or a status from 400 to 599", "Caddyfile:6"}},
		"sticky: max_age":          {source("sticky {\nmax_age 5ms\n}"), []string{"max_age", "1s or more", "Caddyfile:5"}},
		"sticky: many secrets":     {source("sticky {\n" + strings.Repeat("secret hunter2\n", 9) + "}"), []string{"9 secrets", "8 at most", "Caddyfile:13"}},
		"metrics of nothing":       {source("metrics"), []string{"option metrics", "want: metrics service|node [<max nodes>]", "Caddyfile:4"}},
		"metrics by a wrong word":  {source("metrics path"), []string{"option metrics", `"path"`, "service|node", "Caddyfile:4"}},
		"metrics of no node":       {source("metrics node 0"), []string{"option metrics", `"0"`, "1 to 100000", "Caddyfile:4"}},
		"metrics service of nodes": {source("metrics service 10"), []string{"option metrics", "goes with node only", "Caddyfile:4"}},
		"least_load with argument": {"http://:9 {\n\treverse_proxy {\n\t\tlb_policy least_load 2\n\t}\n}", []string{"least_load", `"2"`, "Caddyfile:3"}},
		"least_load with a block":  {"http://:9 {\n\treverse_proxy {\n\t\tlb_policy least_load {\nx\n}\n\t}\n}", []string{"least_load", `"x"`}},
		"least_latency with arg":   {"http://:9 {\n\treverse_proxy {\n\t\tlb_policy least_latency 10s\n\t}\n}", []string{"least_latency", `"10s"`, "decay <duration>", "Caddyfile:3"}},
		"bad decay":                {"http://:9 {\n\treverse_proxy {\n\t\tlb_policy least_latency {\ndecay slowly\n}\n\t}\n}", []string{"least_latency", "option decay", `"slowly"`, "such as 500ms", "Caddyfile:4"}},
		"two registries":           {source("registry nats_kv"), []string{"option registry", "given twice", "Caddyfile:4"}},
		"registry of nothing":      {bare("{\nregistry\n}"), []string{"option registry", "want: registry <backend>", "Caddyfile:4"}},
		"unknown backend":          {bare("{\nregistry etcd http://h\n}"), []string{`unknown backend "etcd"`, "nats, nats_kv, redis", "Caddyfile:4"}},
		"backend for a name":       {bare("redis"), []string{`named "redis", which is a backend`, "Caddyfile:3"}},
		"name with a block":        {bare("{\nregistry main {\nttl 1s\n}\n}"), []string{"registry main", "want no block", "nats_kv", "Caddyfile:5"}},
		"name and more":            {bare("main nats://h"), []string{"registry main", `unexpected argument "nats://h"`, "Caddyfile:3"}},
		"URL and a name":           {bare("nats://h main"), []string{"main", "nats://", "Caddyfile:3"}},
		"unknown URL":              {bare("etcd://h"), []string{"etcd://h", "nats://", "registry <backend>", "Caddyfile:3"}},
		"URL with a password":      {bare("etcd://u:hunter2@h"), []string{"etcd://…@h"}},
		"URL with a query":         {bare("etcd://h?password=hunter2"), []string{"etcd://h?…"}},

		"nats: unknown option": {registry("buckit x"), []string{"registry nats_kv", `unknown option "buckit"`, "bucket, bucket_ttl", "Caddyfile:5"}},
		"nats: bad switch":     {registry("create maybe"), []string{"option create", `"maybe"`, "on|off"}},
		"nats: bad number":     {registry("history 65"), []string{"option history", `"65"`, "1 to 64"}},
		"nats: bad size":       {registry("max_bytes much"), []string{"option max_bytes", `"much"`, "such as 10MiB"}},
		"nats: user alone":     {registry("user joe"), []string{"option user", "want: user <name> <password>"}},
		"nats: bad ttl":        {registry("ttl never"), []string{"option ttl", `"never"`}},
		"nats: bad guard":      {registry("loss_guard most"), []string{"option loss_guard", `"most"`, "1 to 100, or off", "Caddyfile:5"}},
		"nats: bad warm_start": {registry("warm_start maybe"), []string{"option warm_start", `"maybe"`, "on|off"}},
		"nats: bad storage":    {registry("storage tape"), []string{"option storage", "file|memory"}},
		"nats: client auth":    {registry("tls_client_auth cert.pem"), []string{"option tls_client_auth", "<certificate> <key>"}},

		"registrar: unknown option": {registrar("hartbeat 1s"), []string{"registrar", `unknown option "hartbeat"`, "heartbeat", "Caddyfile:3"}},
		"registrar: metadata":       {registrar("metadata zone"), []string{"option metadata", "<key> <value>", "Caddyfile:3"}},
		"registrar: metadata twice": {registrar("metadata zone a\nmetadata zone b"), []string{"option metadata", `"zone" is given twice`, "Caddyfile:4"}},
		"registrar: metadata block": {registrar("metadata {\nzone\n}"), []string{"option metadata", "<key> <value>"}},
		"registrar: drain":          {registrar("drain -1s"), []string{"option drain", `"-1s"`, "0s"}},
		"registrar: until_idle":     {registrar("drain until_idle"), []string{"option drain", "until_idle needs a duration", "Caddyfile:3"}},
		"registrar: until_idle of":  {registrar("drain until_idle 0s"), []string{"option drain", `"0s"`, "above 0", "Caddyfile:3"}},
		"registrar: drain and more": {registrar("drain 1s 2s"), []string{"option drain", "want: drain <duration>|until_idle <max>", "Caddyfile:3"}},
		"registrar: two backends":   {"{\n\tregistrar nats://a http://b\n}", []string{"http://b", "Caddyfile:2"}},

		"discovery: argument":        {"{\n\tdiscovery main\n}", []string{"discovery", `"main"`, "'registry <name> <url>'", "Caddyfile:2"}},
		"discovery: unknown option":  {declared("nats://h"), []string{"discovery", `unknown option "nats://h"`, "registry", "Caddyfile:3"}},
		"discovery: no name":         {declared("registry"), []string{"option registry", "want: registry <name> [<backend>] [<url>...]", "Caddyfile:3"}},
		"discovery: URL for a name":  {declared("registry nats://u:hunter2@h"), []string{`invalid name "nats://…@h"`, "such as main", "Caddyfile:3"}},
		"discovery: backend's name":  {declared("registry redis redis://h"), []string{`named "redis", which is a backend`, "Caddyfile:3"}},
		"discovery: nothing":         {declared("registry main"), []string{"registry main", "want a URL", "nats, nats_kv, redis", "Caddyfile:3"}},
		"discovery: another one":     {declared("registry main nats://h\nregistry spare named main"), []string{"registry spare", "cannot be another one", "Caddyfile:4"}},
		"discovery: unknown URL":     {declared("registry main etcd://u:hunter2@h"), []string{"registry main", "etcd://…@h", "nats://", "Caddyfile:3"}},
		"discovery: backend option":  {declared("registry main nats://h {\nbuckit x\n}"), []string{"registry nats_kv", `unknown option "buckit"`, "Caddyfile:4"}},
		"discovery: no host":         {declared("registry main nats://h {\nhosts\n}"), []string{"registry main", "option hosts", "want: hosts <host...>", "Caddyfile:4"}},
		"discovery: URL for a host":  {declared("registry main nats://h {\nbucket b\nhosts https://shop.example.com\n}"), []string{"option hosts", "shop.example.com or *.apps.example.com", "Caddyfile:5"}},
		"discovery: claim of none":   {declared("registry main nats://h {\nclaim billing\n}"), []string{"option claim", "want: claim <service> <host...>", "Caddyfile:4"}},
		"discovery: claim by nobody": {declared("registry main nats://h {\nclaim \"\" a.example.com\n}"), []string{"option claim", "billing*", "Caddyfile:4"}},
		"discovery: bad claim":       {declared("registry main nats://h {\nclaim a 10.0.0.1\n}"), []string{"option claim", "IP address", "Caddyfile:4"}},
		"discovery: named twice":     {declared("registry main nats://h\nregistry main redis://h"), []string{"the name main is given twice", "Caddyfile:4"}},
		"discovery: twice, in two":   {"{\ndiscovery {\nregistry main nats://h\nregistry spare nats://h/b\n}\ndiscovery {\nregistry main redis://h\n}\n}", []string{"the name main is given twice", "declared are main, spare", "Caddyfile:7"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := tryAdapt(c.caddyfile)
			wantError(t, name, err, c.want...)
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error shows a password: %v", err)
			}
		})
	}
}

// TestProvisionErrors holds that what a Caddyfile parser cannot see is refused
// when the config is loaded.
func TestProvisionErrors(t *testing.T) {
	proxy := func(lines string) string { return "http://:9 {\n\treverse_proxy {\n" + lines + "\n\t}\n}" }
	const two = "{\n\tdiscovery {\n\t\tregistry spare nats://h/spare\n\t\tregistry main nats://h/main\n\t}\n}\n\n"
	for name, c := range map[string]struct {
		caddyfile string
		want      []string
	}{
		"weights by position": {
			proxy("dynamic discovery nats://127.0.0.1:4222\nlb_policy weighted_round_robin 1 2"),
			[]string{"weighted_round_robin", "by position", "round_robin", `"weight"`},
		},
		"weights by position in multi": {
			proxy("dynamic multi {\ndiscovery nats://127.0.0.1:4222\n}\nlb_policy weighted_round_robin 1 2"),
			[]string{"weighted_round_robin"},
		},
		"pick under ip_hash": {
			proxy("dynamic discovery nats://127.0.0.1:4222 {\npick 2\n}\nlb_policy ip_hash"),
			[]string{"lb_policy ip_hash", "'pick 2 hash <placeholder>'", "lb_policy first"},
		},
		"pick under cookie": {
			proxy("dynamic multi {\ndiscovery nats://127.0.0.1:4222 {\npick 3\n}\n}\nlb_policy cookie"),
			[]string{"lb_policy cookie", "'pick 3 hash <placeholder>'"},
		},
		"pick by a constant":              {proxy("dynamic discovery nats://127.0.0.1:4222 {\npick 2 hash tenant\n}"), []string{"pick", `"tenant"`, "placeholder"}},
		"least_load of static upstreams":  {proxy("to 127.0.0.1:1\nlb_policy least_load"), []string{"least_load", "'dynamic discovery'", "least_conn"}},
		"least_load of another source":    {proxy("dynamic a localhost 80\nlb_policy least_load"), []string{"least_load", "'dynamic discovery'"}},
		"least_latency of static ones":    {proxy("to 127.0.0.1:1\nlb_policy least_latency"), []string{"least_latency", "'dynamic discovery'", "least_conn"}},
		"least_latency of another source": {proxy("dynamic a localhost 80\nlb_policy least_latency"), []string{"least_latency", "'dynamic discovery'"}},
		"health of no path":               {proxy("dynamic discovery nats://127.0.0.1:4222 {\nhealth {\nuri healthz\n}\n}"), []string{"health", `"healthz"`, "/healthz"}},
		"health with an unknown variable": {proxy("dynamic discovery nats://127.0.0.1:4222 {\nhealth {\nheader X-Token {env.DISCOVERY_NOT_SET}\n}\n}"), []string{"health: header X-Token", "DISCOVERY_NOT_SET"}},
		"slow_start under first":          {proxy("dynamic discovery nats://127.0.0.1:4222 {\nslow_start 1m\n}\nlb_policy first"), []string{"slow_start has no effect", "lb_policy first", "round_robin"}},
		"slow_start under ip_hash":        {proxy("dynamic discovery nats://127.0.0.1:4222 {\nslow_start 1m\n}\nlb_policy ip_hash"), []string{"slow_start has no effect", "lb_policy ip_hash"}},
		"slow_start under multi, hashing": {proxy("dynamic multi {\ndiscovery nats://127.0.0.1:4222 {\nslow_start 1m\n}\n}\nlb_policy ip_hash"), []string{"slow_start has no effect under lb_policy ip_hash"}},
		"two buckets":                     {proxy("dynamic discovery {\nregistry nats_kv nats://h/a {\nbucket b\n}\n}"), []string{`"a"`, `"b"`, "bucket"}},
		"bad bucket":                      {proxy("dynamic discovery nats://h/a.b"), []string{`"a.b"`, "bucket", "letters"}},
		"bad URL":                         {proxy("dynamic discovery {\nregistry nats_kv redis://h\n}"), []string{"redis://h", "nats"}},
		"two credentials":                 {proxy("dynamic discovery {\nregistry nats_kv {\ntoken a\nuser b c\n}\n}"), []string{"token", "user"}},
		"unknown variable":                {proxy("dynamic discovery {\nregistry nats_kv {\ntoken {env.DISCOVERY_NOT_SET}\n}\n}"), []string{"DISCOVERY_NOT_SET"}},
		"no registry":                     {proxy("dynamic discovery"), []string{"the registry is missing", "registry <backend>", "discovery { registry <name> <url> }", "Caddyfile:3"}},
		"no registry, registrar":          {"{\n\tregistrar\n}", []string{"the registry is missing", "Caddyfile:2"}},
		"no such registry":                {proxy("dynamic discovery main"), []string{`there is no registry "main"`, "none is declared", "Caddyfile:3"}},
		"another registry":                {two + proxy("dynamic discovery {\nregistry mian\n}"), []string{`there is no registry "mian"`, "declared are main, spare", "Caddyfile:11"}},
		"another registry, registrar":     {strings.Replace(two, "{", "{\nregistrar mian", 1), []string{`there is no registry "mian"`, "declared are main, spare", "Caddyfile:2"}},
		"one of two registries":           {two + proxy("dynamic discovery"), []string{"the registry is missing", "want one of main, spare", "Caddyfile:10"}},
		"bad settings of a named one":     {strings.Replace(two, "nats://h/spare", "nats_kv {env.DISCOVERY_NOT_SET}", 1), []string{"registry spare", "DISCOVERY_NOT_SET"}},
		"hosts of a variable":             {strings.Replace(two, "h/spare", "h/spare {\nhosts {env.DISCOVERY_NOT_SET}\n}", 1), []string{"registry spare", "hosts", "DISCOVERY_NOT_SET"}},
		"hosts that differ":               {strings.Replace(two, "h/spare", "h/main {\nhosts a.example.com\n}", 1), []string{"main and spare are the same registry", "hosts"}},
		"certificate, no key":             {proxy("dynamic discovery {\nregistry nats_kv {\ntls_client_auth {env.HOME} {env.DISCOVERY_NOT_SET}\n}\n}"), []string{"DISCOVERY_NOT_SET"}},
	} {
		t.Run(name, func(t *testing.T) {
			wantError(t, name, validate(c.caddyfile), c.want...)
		})
	}
}
