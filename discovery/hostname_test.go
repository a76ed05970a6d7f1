package discovery_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestParseHost(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, c := range []struct{ in, want, refused string }{
		{"shop.example.com", "shop.example.com", ""},
		{"Shop.EXAMPLE.com.", "shop.example.com", ""},
		{"localhost", "localhost", ""},
		{"my_app.local", "my_app.local", ""},
		{"*.apps.example.com", "*.apps.example.com", ""},
		{"bücher.example", "xn--bcher-kva.example", ""},
		{"BÜCHER.example", "xn--bcher-kva.example", ""},
		{"xn--bcher-kva.example", "xn--bcher-kva.example", ""},
		{"XN--BCHER-KVA.example", "xn--bcher-kva.example", ""},
		{"*.bücher.example", "*.xn--bcher-kva.example", ""},
		{"straße.example", "xn--strae-oqa.example", ""}, // not strasse: browsers are not transitional
		{"ｓｈｏｐ。example.com", "shop.example.com", ""},    // full width, with an ideographic stop
		{"例え.テスト", "xn--r8jz45g.xn--zckzah", ""},
		{"日本語kanji.example", "xn--kanji-1e1k07ec84j.example", ""}, // Japanese texts have Latin letters
		{"почта.example", "xn--80a1acny.example", ""},
		{long + "." + long + ".example", long + "." + long + ".example", ""},

		{"", "", "empty"},
		{".", "", "no host name"},
		{"a..b", "", "no host name"},
		{".example.com", "", "no host name"},
		{"-a.example.com", "", "no host name"},
		{"a b.example.com", "", "no host name"},
		{"shop.example.com:443", "", "port"},
		{"https://shop.example.com", "", "URL"},
		{"shop.example.com/api", "", "URL"},
		{"*", "", "wildcard"},
		{"*.", "", "no host name"},
		{"*.*.example.com", "", "wildcard"},
		{"a.*.example.com", "", "wildcard"},
		{"a*.example.com", "", "wildcard"},
		{"10.0.0.1", "", "IP address"},
		{"10.0.0.1:80", "", "IP address"},
		{"1.2.3", "", "IP address"}, // browsers read it as one
		{"0x7f.1", "", "IP address"},
		{"0X7F000001", "", "IP address"},
		{"2130706433", "", "IP address"},
		{"１２７.0.0.1", "", "IP address"}, // full width
		{"*.10.0.0.1", "", "IP address"},
		{"::1", "", "IP address"},
		{"[::1]:80", "", "IP address"},
		{"fe80::1%eth0", "", "IP address"},
		{long + "a.example", "", "too long"},
		{strings.Repeat("a.", 600), "", "too long"},
		{strings.Repeat("ü", 4000), "", "too long"},
		{"shор.example.com", "", "look alike"},   // Cyrillic о and р
		{"xn--sh-fmc8b.example.com", "", "look"}, // the same in its other form
		{"αpple.example", "", "look alike"},      // Greek α
		{"xn--a.example", "", "internationalized"},
		{"xn--.example", "", "no host name"},
		{"xn--abc-.example", "", "internationalized"}, // ASCII in disguise
		{"a\u200db.example", "", "internationalized"},
		{"a\u202eb.example", "", "internationalized"},
		{"shop\u0000.example", "", "no host name"},
		{"$(id).example", "", "no host name"},
		{"{env.SECRET}", "", "no host name"},
	} {
		got, err := discovery.ParseHost(c.in)
		switch {
		case got != c.want:
			t.Errorf("ParseHost(%q) = %q, %v, want %q", c.in, got, err, c.want)
		case c.refused == "" && err != nil, c.refused != "" && (!errors.Is(err, discovery.ErrInvalid) || !strings.Contains(err.Error(), c.refused)):
			t.Errorf("ParseHost(%q): %v, want %q in it", c.in, err, c.refused)
		}
		if again, err := discovery.ParseHost(got); c.want != "" && (again != got || err != nil) {
			t.Errorf("ParseHost(%q), which is in normal form, is %q, %v", got, again, err)
		}
	}
}

func TestRequestHost(t *testing.T) {
	for in, want := range map[string]string{
		"shop.example.com":              "shop.example.com",
		"shop.example.com:8443":         "shop.example.com",
		"SHOP.example.COM:8443":         "shop.example.com",
		"shop.example.com.":             "shop.example.com",
		"Shop.example.com.:80":          "shop.example.com",
		"bücher.example":                "xn--bcher-kva.example",
		"XN--bcher-KVA.example:80":      "xn--bcher-kva.example",
		"":                              "",
		":80":                           "",
		"[::1]:80":                      "[::1]:80", // what no node can have
		"\xff\xfe":                      "",
		strings.Repeat("ü", 1<<16):      "",
		strings.Repeat("xn--", 1<<16):   "",
		"a.example.com:80:80":           "a.example.com:80",
		"xn--" + strings.Repeat("a", 9): "",
	} {
		if got := discovery.RequestHost(in); got != want {
			t.Errorf("RequestHost(%.40q) = %q, want %q", in, got, want)
		}
	}
	const host = "shop.example.com:443"
	if n := testing.AllocsPerRun(100, func() { discovery.RequestHost(host) }); n > 0 {
		t.Errorf("RequestHost of a name in normal form allocates %v times", n)
	}
}

func TestParsePath(t *testing.T) {
	for _, c := range []struct{ in, want, refused string }{
		{"/api/*", "/api/*", ""},
		{"/api/", "/api/*", ""},
		{"/api", "/api/*", ""},
		{"/API/V2/*", "/api/v2/*", ""},
		{"/café/*", "/café/*", ""},
		{"/", "/*", ""},
		{"/*", "/*", ""},
		{"", "", "slash"},
		{"api", "", "slash"},
		{"*", "", "slash"},
		{"/api*", "", "wildcard"},
		{"/*/x", "", "wildcard"},
		{"/a/*/*", "", "wildcard"},
		{"/a/**", "", "wildcard"},
		{"//", "", "part of it is empty"},
		{"//a", "", "part of it is empty"},
		{"/a//b", "", "part of it is empty"},
		{"/a//*", "", "part of it is empty"},
		{"/a/../b", "", "part of it is empty"},
		{"/a/.", "", "part of it is empty"},
		{"/..", "", "part of it is empty"},
		{"/a?b", "", "plain path"},
		{"/%61", "", "plain path"},
		{`/a\b`, "", "plain path"},
		{"/" + strings.Repeat("a", 256), "", "256 bytes"},
	} {
		got, err := discovery.ParsePath(c.in)
		switch {
		case got != c.want:
			t.Errorf("ParsePath(%q) = %q, %v, want %q", c.in, got, err, c.want)
		case c.refused == "" && err != nil, c.refused != "" && (!errors.Is(err, discovery.ErrInvalid) || !strings.Contains(err.Error(), c.refused)):
			t.Errorf("ParsePath(%q): %v, want %q in it", c.in, err, c.refused)
		}
	}
}
