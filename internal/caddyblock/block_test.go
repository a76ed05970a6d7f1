package caddyblock

import (
	"errors"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// settings has an option of each kind.
type settings struct {
	Name, User, Password, Kind, Even string
	On                               bool
	Maybe                            *bool
	Wait                             caddy.Duration
	Drain                            *caddy.Duration
	Count                            int
	Share                            *int
	Bytes                            int64
	Headers                          http.Header
	TCP                              bool
	Inner                            string
	Loose                            []string
}

func (s *settings) options() Options {
	return Options{
		"name":   Text("<name>", &s.Name),
		"user":   Texts("<name> <password>", &s.User, &s.Password),
		"kind":   OneOf(&s.Kind, "big", "small"),
		"on":     Switch(&s.On),
		"maybe":  OptionalSwitch(&s.Maybe),
		"wait":   Duration(&s.Wait),
		"drain":  OptionalDuration(&s.Drain),
		"count":  Number(&s.Count, 1, 9),
		"share":  PercentOrOff(&s.Share),
		"bytes":  Size(&s.Bytes),
		"header": Header(&s.Headers),
		"tcp":    Present(&s.TCP),
		"even": Value("<text>", &s.Even, func(arg string) (string, error) {
			if len(arg)%2 != 0 {
				return "", errors.New("it is odd")
			}
			return arg, nil
		}),
		"block": {Usage: "{ inner <text> }", Custom: func(d *caddyfile.Dispenser) error {
			if d.NextArg() {
				return ErrUsage
			}
			return Block{What: "block", Options: Options{"inner": Text("<text>", &s.Inner)}}.Parse(d)
		}},
		"loose": {Usage: "<text>", Custom: func(d *caddyfile.Dispenser) error {
			if !d.NextArg() {
				return Placed(d.Err("placed by itself"))
			}
			if d.Val() == "bad" {
				return errors.New("not placed")
			}
			s.Loose = append(s.Loose, d.Val())
			return nil
		}},
	}
}

func parse(s *settings, check func() error, lines string) error {
	d := caddyfile.NewTestDispenser("thing {\n" + lines + "\n}")
	d.Next()
	return Block{What: "thing", Options: s.options(), Check: check}.Parse(d)
}

func TestOptions(t *testing.T) {
	for lines, want := range map[string]settings{
		"":                                      {},
		"name a":                                {Name: "a"},
		"user a b":                              {User: "a", Password: "b"},
		"kind small":                            {Kind: "small"},
		"on on":                                 {On: true},
		"on off":                                {},
		"maybe off":                             {Maybe: new(false)},
		"maybe on":                              {Maybe: new(true)},
		"wait 1d":                               {Wait: caddy.Duration(24 * 3600e9)},
		"drain 0s":                              {Drain: new(caddy.Duration(0))},
		"count 9":                               {Count: 9},
		"share off":                             {Share: new(0)},
		"share 70%":                             {Share: new(70)},
		"share 100":                             {Share: new(100)},
		"bytes 1MiB":                            {Bytes: 1 << 20},
		"header a b\nheader a c\nheader d \"\"": {Headers: http.Header{"A": {"b", "c"}, "D": {""}}},
		"tcp":                                   {TCP: true},
		"even ab":                               {Even: "ab"},
		"block {\ninner x\n}\nname a":           {Inner: "x", Name: "a"},
		"loose x":                               {Loose: []string{"x"}},
	} {
		var got settings
		if err := parse(&got, nil, lines); err != nil {
			t.Errorf("%q: %v", lines, err)
		} else if !reflect.DeepEqual(got, want) {
			t.Errorf("%q came to\n%+v, want\n%+v", lines, got, want)
		}
	}
}

// TestMistakes holds that a mistake is told once with its option, what would be
// accepted, and its line.
func TestMistakes(t *testing.T) {
	for _, c := range []struct{ lines, want string }{
		{"nam x", `thing: unknown option "nam", want one of block, bytes, count, drain, even, header, kind, loose, maybe, name, on, share, tcp, user, wait, at Testfile:2`},
		{"nats://u:hunter2@h", `thing: unknown option "nats://…@h", want one of`},
		{"name a\nname b", `thing: option name is given twice, want it once: name <name>, at Testfile:3`},
		{"name", `thing: wrong number of arguments for option name, want: name <name>, at Testfile:2`},
		{"name a b", `thing: wrong number of arguments for option name, want: name <name>, at Testfile:2`},
		{`name ""`, `thing: option name: an argument is empty, want <name>, at Testfile:2`},
		{"name a {\nx\n}", `thing: option name takes no block, want: name <name>, at Testfile:3`},
		{"user a", `want: user <name> <password>`},
		{`user a ""`, `an argument is empty, want <name> <password>`},
		{"kind none", `thing: option kind: invalid value "none", want big|small, at Testfile:2`},
		{"on maybe", `invalid value "maybe", want on|off`},
		{"maybe maybe", `invalid value "maybe", want on|off`},
		{"wait 0s", `invalid duration "0s", want one above 0 such as 500ms, 10s or 5m`},
		{"wait soon", `invalid duration "soon"`},
		{"drain -1s", `invalid duration "-1s", want 0s or one such as`},
		{"count 10", `invalid number "10", want 1 to 9`},
		{"count many", `invalid number "many", want 1 to 9`},
		{"share 0", `invalid percentage "0", want 1 to 100, or off`},
		{"share 101", `invalid percentage "101", want 1 to 100, or off`},
		{"bytes 0", `invalid size "0", want one above 0 such as 10MiB or 1GiB`},
		{"bytes 8EiB", `invalid size "8EiB"`},
		{`header "" x`, `the name is empty, want <name> <value>`},
		{"tcp on", `thing: wrong number of arguments for option tcp, want: tcp (no arguments)`},
		{"even abc", `thing: option even: it is odd, at Testfile:2`},
		{"block x", `thing: wrong number of arguments for option block, want: block { inner <text> }, at Testfile:2`},
		{"block {\nouter x\n}", `block: unknown option "outer", want one of inner, at Testfile:3`},
		{"loose", `placed by itself, at Testfile:2`},
		{"loose bad", `thing: option loose: not placed, at Testfile:2`},
	} {
		err := parse(new(settings), nil, c.lines)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v\nwant %s", c.lines, err, c.want)
		} else if strings.Count(err.Error(), ", at ") != 1 {
			t.Errorf("%q: the place is not told once: %v", c.lines, err)
		}
	}
}

// TestCheckNamesTheLine holds that what is wrong with all options together is told of
// the line since which it was wrong, and not at all if a later line makes it right.
func TestCheckNamesTheLine(t *testing.T) {
	for lines, want := range map[string]string{
		"name a\non on":                     "on without kind, at Testfile:3",
		"name a\non on\ncount 1\nwait 1s":   "on without kind, at Testfile:3",
		"on on\nkind big":                   "",
		"on on\ncount 2\nkind big":          "",
		"on on\ncount 2\nwait 1s":           "on without kind, at Testfile:2",
		"count 9\non on\nkind big\nname ab": "count 9, at Testfile:2",
	} {
		s := new(settings)
		err := parse(s, func() error {
			switch {
			case s.On && s.Kind == "":
				return errors.New("on without kind")
			case s.Count == 9:
				return errors.New("count 9")
			}
			return nil
		}, lines)
		if want == "" && err != nil || want != "" && (err == nil || err.Error() != "thing: "+want) {
			t.Errorf("%q: %v, want %q", lines, err, want)
		}
	}
}

// TestLiterals holds that a check counts only where no placeholder can change what it
// finds.
func TestLiterals(t *testing.T) {
	type module struct {
		URLs  []string `json:"urls,omitempty"`
		Text  string   `json:"text,omitempty"`
		Later string   `json:"later,omitempty"`
	}
	check := func(m *module) error {
		switch {
		case strings.Contains(m.Text, "bad"):
			return errors.New("bad text")
		case m.Text == "{nonsense}":
			return errors.New("unknown placeholder")
		case len(m.URLs) > 0 && m.URLs[0] != "redis+cluster://1":
			return errors.New("no cluster")
		case m.Later != "" && m.Later != "{env.LATER}":
			return errors.New("later was replaced")
		}
		return nil
	}
	for _, c := range []struct {
		module module
		want   string
	}{
		{module{Text: "good"}, ""},
		{module{Text: "bad"}, "bad text"},
		{module{Text: "{env.X}"}, ""},
		{module{Text: "{env.X}bad"}, "bad text"},
		{module{Text: "bad{env.X}"}, ""},
		{module{Text: "{nonsense}"}, "unknown placeholder"},
		{module{URLs: []string{"{env.URL}"}}, ""},
		{module{URLs: []string{"redis://h"}}, "no cluster"},
		{module{URLs: []string{"redis://h"}, Text: "{env.X}"}, "no cluster"},
		{module{Later: "{env.LATER}"}, ""},
	} {
		err := Literals(&c.module, check, "later")()
		if c.want == "" && err != nil || c.want != "" && (err == nil || err.Error() != c.want) {
			t.Errorf("%+v: %v, want %q", c.module, err, c.want)
		}
	}
}

func TestCheckDuration(t *testing.T) {
	if err := CheckDuration("ttl", 0); err != nil {
		t.Error(err)
	}
	if err := CheckDuration("ttl", -1); err == nil || err.Error() != "ttl: invalid duration -1ns, want one above 0" {
		t.Error(err)
	}
}

func TestCheckURL(t *testing.T) {
	for value, want := range map[string]string{
		"http://127.0.0.1:9000/healthz": "",
		"https://h":                     "",
		"":                              `option: invalid URL "", want http://host[:port][/path] or https://…`,
		"h:9000":                        `option: invalid URL "h:9000", want http://host[:port][/path] or https://…`,
		"ftp://u:hunter2@h":             `option: invalid URL "ftp://…@h", want http://host[:port][/path] or https://…`,
		"http://":                       `option: invalid URL "http://", want http://host[:port][/path] or https://…`,
	} {
		err := CheckURL("option", value)
		if (err == nil) != (want == "") || err != nil && err.Error() != want {
			t.Errorf("%q: %v, want %q", value, err, want)
		}
	}
}
