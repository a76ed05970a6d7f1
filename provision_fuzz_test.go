package caddydiscovery

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// provisioned are the places in a JSON configuration where our modules stand, each
// with a mark where the module's own JSON goes.
var provisioned = []string{
	`{"admin":{"disabled":true},"apps":{"registrar":#}}`,
	`{"admin":{"disabled":true},"apps":{"registrar":{"nodes":[#]}}}`,
	httpJSON(`{"handler":"reverse_proxy","dynamic_upstreams":#}`),
	httpJSON(`{"handler":"reverse_proxy","dynamic_upstreams":{"source":"discovery","registry":#}}`),
	httpJSON(`{"handler":"reverse_proxy","dynamic_upstreams":{"source":"discovery","registry":{"backend":"nats"},"health":#}}`),
	httpJSON(`{"handler":"reverse_proxy","dynamic_upstreams":{"source":"discovery","registry":{"backend":"nats"},"pick":#}}`),
	httpJSON(`{"handler":"reverse_proxy","dynamic_upstreams":{"source":"discovery","registry":{"backend":"nats"},"where":#}}`),
	httpJSON(`{"handler":"reverse_proxy","load_balancing":{"selection_policy":{"policy":"least_load"}},"dynamic_upstreams":#}`),
	httpJSON(`#`),
	`{"admin":{"disabled":true},"apps":{"discovery":#}}`,
	`{"admin":{"disabled":true},"apps":{"discovery":{"registries":{"main":{"registry":{"backend":"nats"},"hosts":["a.example.com"]}}},"tls":{"automation":{"on_demand":{"permission":#}}}}}`,
	httpJSON(`{"handler":"reverse_proxy","load_balancing":{"selection_policy":{"policy":"least_latency","decay":"5s"}},"dynamic_upstreams":#}`),
}

func httpJSON(handler string) string {
	return `{"admin":{"disabled":true},"apps":{"http":{"servers":{"a":{"listen":[":9"],"routes":[{"handle":[` + handler + `]}]}}}}}`
}

// inhospitable is JSON that a Caddyfile cannot say, by its place.
var inhospitable = []struct {
	place byte
	json  string
	want  string // in the error; none: it is accepted
}{
	{0, `{"nodes":[null]}`, "node 1 is null"},
	{0, `{"nodes":[{"registry":{"backend":"nats"},"endpoint":"http://h:1"},null]}`, "node 2 is null"},
	{0, `null`, "cannot be null"},
	{1, `{}`, "the registry is missing"},
	{1, `{"registry":null}`, "the registry's backend is missing"},
	{1, `{"registry":{"backend":"nats","urls":[""]},"endpoint":"http://h:1"}`, "it is empty"},
	{1, `{"registry":{"backend":"nats"},"endpoint":"http://h:1","drain":-1}`, "drain: invalid duration"},
	{1, `{"registry":{"backend":"nats"},"endpoint":"http://h:1","heartbeat":9223372036854775807}`, "ttl"},
	{1, `{"registry":{"backend":"nats"},"endpoint":"http://h:1","metadata":{"":""}}`, "keys must not be empty"},
	{2, `{"source":"discovery"}`, "the registry is missing"},
	{2, `{"source":"discovery","registry":[]}`, "the registry's backend is missing"},
	{2, `{"source":"discovery","registry":{"backend":"nats"},"where":[{}]}`, "where: a criterion needs a key"},
	{2, `{"source":"discovery","registry":{"backend":"nats"},"prefer":[{"key":"a","values":[]}]}`, "prefer: a criterion needs a key"},
	{2, `{"source":"discovery","registry":{"backend":"nats"},"pick":{}}`, "pick: invalid count 0"},
	{2, `{"source":"discovery","registry":{"backend":"nats"},"subset":-1}`, "subset: invalid number -1"},
	{2, `{"source":"discovery","registry":{"backend":"nats"},"allow":[""]}`, "allow"},
	{3, `{"backend":"nats_kv","history":-1}`, "history"},
	{3, `{"backend":"redis","poll":1}`, "poll"},
	{3, `{"backend":"redis","db":-1}`, "db"},
	{3, `{"backend":"nats","loss_guard":-1}`, "loss_guard"},
	{3, `{"backend":"nats","ttl":-1}`, "ttl"},
	{3, `{"backend":"named"}`, "the registry is missing"},
	{3, `{"backend":"named","name":"http://u:hunter2@h"}`, `there is no registry "http://…@h"`},
	{9, `null`, "cannot be null"},
	{9, `{"registries":{"main":null}}`, "registry main: it is null"},
	{9, `{"registries":{"main":{}}}`, "registry main: the registry is missing"},
	{9, `{"registries":{"main":{"registry":{"backend":"named","name":"main"}}}}`, "cannot be another one"},
	{9, `{"registries":{"nats":{"registry":{"backend":"nats"}}}}`, "which is a backend"},
	{9, `{"registries":{"main":{"registry":{"backend":"nats"},"hosts":["a b"]}}}`, "it is no host name"},
	{9, `{"registries":{"main":{"registry":{"backend":"nats"},"claims":[{"service":"a"}]}}}`, "claim: want a service"},
	{9, `{"registries":{"a b":{"registry":{"backend":"nats"}}}}`, "invalid name"},
	{4, `{"headers":{"Host":[]}}`, "header Host has no value"},
	{4, `{"headers":{"host":null}}`, "header host has no value"},
	{4, `{"headers":{"X-A":[]}}`, "header X-A has no value"},
	{4, `{"headers":{"a b":["c"]}}`, "invalid name"},
	{4, `{"headers":{"":["c"]}}`, "invalid name"},
	{4, `{"headers":{"A":["c\r\nB: d"]}}`, "invalid value"},
	{4, `{"headers":{"A":[""]}}`, ""},
	{4, `{"uri":"/%zz"}`, "uri"},
	{4, `{"uri":"/a b"}`, ""},
	{4, `{"port":-1}`, "invalid port"},
	{4, `{"passes":-1}`, "invalid passes"},
	{4, `{"status":"-xx"}`, "status"},
	{4, `null`, ""},
	{5, `{"count":-1}`, "pick: invalid count -1"},
	{8, `{"handler":"discovery_status","allow":[""]}`, "allow: invalid network"},
	{8, `{"handler":"discovery_status","max_streams":-1}`, "max_streams"},
	{8, `{"handler":"discovery_status","allow":null}`, ""},
	{10, `{"module":"discovery","linger":-1}`, "linger: invalid duration"},
	{10, `{"module":"discovery","linger":2592000000000001}`, "linger: 720h0m0.000000001s is too long, want at most 720h"},
	{10, `{"module":"discovery","limit":{}}`, "limit: invalid number 0"},
	{10, `{"module":"discovery","limit":{"names":1}}`, "limit: invalid period"},
	{10, `{"module":"discovery","registry":{"backend":"nats","loss_guard":60}}`, "declare it in the global option discovery"},
	{10, `{"module":"discovery","registry":{"backend":"named","name":"other"}}`, `no registry "other"`},
	{10, `{"module":"discovery","registry":{"backend":"nats"}}`, ""},
	{10, `{"module":"discovery"}`, ""},
}

// provisionJSON loads a configuration as far as caddy validate does.
func provisionJSON(place byte, raw string) error {
	var config *caddy.Config
	source := strings.Replace(provisioned[int(place)%len(provisioned)], "#", raw, 1)
	if err := caddy.StrictUnmarshalJSON([]byte(source), &config); err != nil {
		return err
	}
	return caddy.Validate(config)
}

// TestProvisionJSON holds that what only JSON can say is an error when it is loaded,
// and no panic then or later.
func TestProvisionJSON(t *testing.T) {
	for _, c := range inhospitable {
		err := provisionJSON(c.place, c.json)
		if c.want == "" {
			if err != nil {
				t.Errorf("place %d, %s: %v", c.place, c.json, err)
			}
			continue
		}
		wantError(t, c.json, err, c.want)
	}
}

// FuzzProvision holds that no JSON makes a module of ours panic, when it is loaded
// or when its health checks are made.
func FuzzProvision(f *testing.F) {
	for _, c := range inhospitable {
		f.Add(c.place, c.json)
	}
	f.Fuzz(func(t *testing.T, place byte, raw string) {
		if len(raw) > 4<<10 || strings.Contains(raw, "file.") || !json.Valid([]byte(raw)) {
			return // a placeholder may name any file
		}
		_ = provisionJSON(place, raw)
		h := new(Health)
		if json.Unmarshal([]byte(raw), h) == nil && h.check() == nil {
			options := h.options(false)
			if _, err := options.Request(context.Background(), "10.0.0.1:80", "h:80"); err != nil {
				t.Errorf("%s is accepted, and no check can be made: %v", raw, err)
			}
		}
	})
}
