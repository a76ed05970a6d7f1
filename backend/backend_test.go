package backend

import (
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// foreign stands for somebody else's backend, with any settings.
type foreign struct {
	Options
	module   caddy.ModuleID
	settings string
}

func (f foreign) CaddyModule() caddy.ModuleInfo { return caddy.ModuleInfo{ID: f.module} }
func (f foreign) MarshalJSON() ([]byte, error)  { return []byte(f.settings), nil }
func (f foreign) Addresses() []string           { return []string{"h:1"} }
func (f foreign) Open(*slog.Logger) (discovery.Registry, error) {
	return nil, errors.ErrUnsupported
}

func TestOptionsProvision(t *testing.T) {
	var o Options
	if err := o.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	if time.Duration(o.TTL) != discovery.DefaultTTL || *o.LossGuard != discovery.DefaultLossGuard || !*o.WarmStart {
		t.Errorf("the defaults are %v, %d, %v", o.TTL, *o.LossGuard, *o.WarmStart)
	}
	for want, o := range map[string]Options{
		"ttl: invalid duration":          {TTL: -1},
		"loss_guard: invalid percentage": {LossGuard: new(101)},
		"loss_guard: invalid":            {LossGuard: new(-1)},
	} {
		if err := o.Provision(caddy.Context{}); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestDirectoryOptions(t *testing.T) {
	for _, c := range []struct {
		options Options
		warm    bool
	}{
		{Options{}, true}, // not provisioned: the core has the same defaults
		{Options{TTL: 7, LossGuard: new(70), WarmStart: new(true)}, true},
		{Options{LossGuard: new(0), WarmStart: new(false)}, false},
	} {
		got, err := DirectoryOptions(foreign{Options: c.options, module: "m", settings: "{}"})
		if err != nil {
			t.Fatal(err)
		}
		if got.TTL != time.Duration(c.options.TTL) || got.LossGuard != c.options.LossGuard || (got.WarmStart.Path != "") != c.warm ||
			len(got.Addresses) != 1 || got.Addresses[0] != "h:1" {
			t.Errorf("%+v came to %+v", c.options, got)
		}
	}
	if _, err := DirectoryOptions(foreign{settings: `"text"`}); err == nil {
		t.Error("settings that are no object have a public name")
	}
}

// TestKeyOf holds that every setting and the kind of registry make another key.
func TestKeyOf(t *testing.T) {
	key := func(module caddy.ModuleID, settings string) Key {
		k, err := KeyOf(foreign{module: module, settings: settings})
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	base := key("m", `{"password":"a"}`)
	if key("m", `{"password":"a"}`) != base {
		t.Error("the same settings have two keys")
	}
	if key("m", `{"password":"b"}`) == base || key("n", `{"password":"a"}`) == base {
		t.Error("other settings, or another module, have the same key")
	}
}

// TestPublicName holds that the name of the file tells registries apart, and nothing
// about their secrets.
func TestPublicName(t *testing.T) {
	name := func(settings string) string {
		n, err := publicName(foreign{module: "m", settings: settings})
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	base := name(`{"urls":["nats://a:4222"],"bucket":"b","ttl":1}`)
	for settings, same := range map[string]bool{
		`{"bucket":"b","urls":["nats://a:4222"]}`:                                            true,
		`{"urls":["nats://u:secret@a:4222"],"bucket":"b"}`:                                   true,
		`{"urls":["nats://a:4222"],"bucket":"b","password":"x","user":"y","token":"z"}`:      true,
		`{"urls":["nats://a:4222"],"bucket":"b","credentials":"f","nkey":"g","tls_key":"k"}`: true,
		`{"urls":["nats://a:4222"],"bucket":"b","sentinel_password":"x","loss_guard":3}`:     true,
		`{"urls":["nats://a:4222"],"bucket":"c"}`:                                            false,
		`{"urls":["nats://b:4222"],"bucket":"b"}`:                                            false,
		`{"urls":["nats://a:4222"],"bucket":"b","key_prefix":"x."}`:                          false,
		`{"urls":["nats://a:4222"],"bucket":"b","key":"other"}`:                              false,
	} {
		if got := name(settings) == base; got != same {
			t.Errorf("%s: the same name %v, want %v", settings, got, same)
		}
	}
	if strings.ContainsAny(base, "/\\.:") || len(base) != 32 {
		t.Errorf("the name is %q", base)
	}
}

func TestNameOf(t *testing.T) {
	for urls, want := range map[string]string{
		"":                             "",
		"nats://a tls://b":             "nats_kv",
		"NATS+PUBSUB://a":              "nats",
		"rediss+sentinel://a redis://": "redis",
	} {
		if got, err := NameOf(strings.Fields(urls)...); err != nil || got != want {
			t.Errorf("%q: %q, %v, want %q", urls, got, err, want)
		}
	}
	for urls, want := range map[string]string{
		"etcd://u:hunter2@h": "etcd://…@h does not name a backend by its scheme, want one of nats://, ",
		"nats://a redis://b": "the URLs name two backends, nats_kv and redis; want one",
		"a":                  "a does not name a backend by its scheme",
	} {
		if _, err := NameOf(strings.Fields(urls)...); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", urls, err, want)
		}
	}
}

// TestUnmarshalBlock holds that somebody else's backend gets the options of all of
// them, and what it says of its own.
func TestUnmarshalBlock(t *testing.T) {
	var folder string
	read := func(lines string) (o Options, err error) {
		d := caddyfile.NewTestDispenser("file {\n" + lines + "\n}")
		d.Next()
		return o, o.UnmarshalBlock(d, "file", map[string]func([]string) error{
			"folder": func(args []string) error {
				if len(args) != 1 {
					return errors.New("want folder <path>")
				}
				folder = args[0]
				return nil
			},
		})
	}
	o, err := read("ttl 5s\nfolder /x\nloss_guard off\nwarm_start off")
	if err != nil || time.Duration(o.TTL) != 5*time.Second || *o.LossGuard != 0 || *o.WarmStart || folder != "/x" {
		t.Errorf("it came to %+v, %q: %v", o, folder, err)
	}
	for lines, want := range map[string]string{
		"folder":                "registry file: option folder: want folder <path>, at Testfile:2",
		"ttl 1s\nttl 2s":        "registry file: option ttl is given twice, want it once: ttl <duration>, at Testfile:3",
		"folder /x\nfolder /x":  "registry file: option folder is given twice",
		"fold x":                `registry file: unknown option "fold", want one of folder, loss_guard, ttl, warm_start, at Testfile:2`,
		"loss_guard most":       "registry file: option loss_guard: invalid percentage",
		"folder /x {\nwatch\n}": "registry file: option folder takes no block",
	} {
		if _, err := read(lines); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v, want %s", lines, err, want)
		}
	}
}

// terse is somebody else's backend, whose error names no place.
type terse struct{ foreign }

func (terse) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "discovery.registries.terse", New: func() caddy.Module { return new(terse) }}
}

func (*terse) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.Errf("too much: %s", d.Val())
	}
	return errors.New("too little")
}

// TestUnmarshalNamesThePlace holds that an error has file and line once, whether the
// backend says them or not.
func TestUnmarshalNamesThePlace(t *testing.T) {
	caddy.RegisterModule(terse{})
	for source, want := range map[string]string{
		"terse":       "registry terse: too little, at Testfile:1",
		"terse x":     "too much: x, at Testfile:1",
		"\n\nother x": `registry: unknown backend "other", want one of terse, or the name of a registry, at Testfile:3`,
	} {
		d := caddyfile.NewTestDispenser(source)
		d.Next()
		if _, err := Unmarshal(d); err == nil || !strings.HasPrefix(err.Error(), want) || strings.Count(err.Error(), "Testfile") != 1 {
			t.Errorf("%q: %v, want %s", source, err, want)
		}
	}
}

func TestHasLogin(t *testing.T) {
	for _, c := range []struct {
		backend interface {
			LoginReporter
			caddy.Provisioner
		}
		want bool
	}{
		{&NATSKV{}, false},
		{&NATS{NATSConnection: NATSConnection{URLs: []string{"nats+pubsub://h"}}}, false},
		{&NATSKV{NATSConnection: NATSConnection{URLs: []string{"nats://u:p@h"}}}, true},
		{&NATSKV{NATSConnection: NATSConnection{Token: "t"}}, true},
		{&Redis{}, false},
		{&Redis{Password: "p"}, true},
	} {
		if err := c.backend.Provision(caddy.Context{}); err != nil {
			t.Fatal(err)
		}
		if got := c.backend.HasLogin(); got != c.want {
			t.Errorf("%T: %v, want %v", c.backend, got, c.want)
		}
	}
}

// TestSpellings holds that two spellings of a registry are one registry.
func TestSpellings(t *testing.T) {
	spell := func(b Backend) Key {
		if err := b.(caddy.Provisioner).Provision(caddy.Context{}); err != nil {
			t.Fatal(err)
		}
		k, err := KeyOf(b)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	for name, pair := range map[string][2]Backend{
		"nats_kv": {&NATSKV{}, &NATSKV{NATSConnection: NATSConnection{URLs: []string{"nats://127.0.0.1:4222/catga_nodes"}}, Create: new(true), History: 10}},
		"nats":    {&NATS{}, &NATS{SubjectPrefix: "catga.nodes", Options: Options{WarmStart: new(true)}}},
		"redis":   {&Redis{}, &Redis{URLs: []string{"redis://127.0.0.1/0"}, Key: "catga:nodes", Options: Options{LossGuard: new(50)}}},
	} {
		if spell(pair[0]) != spell(pair[1]) {
			a, _ := json.Marshal(pair[0])
			b, _ := json.Marshal(pair[1])
			t.Errorf("%s: %s and %s are two registries", name, a, b)
		}
	}
}
