package discovery

import (
	"errors"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
)

func TestParseEndpoint(t *testing.T) {
	for in, want := range map[string]string{
		"http://10.0.0.7:5001":                  "http://10.0.0.7:5001",
		"https://10.0.0.7:5001/":                "https://10.0.0.7:5001",
		"10.0.0.7:5001":                         "10.0.0.7:5001",
		"http://h":                              "http://h:80",
		"http://h/":                             "http://h:80",
		"https://h":                             "https://h:443",
		"HTTPS://Web-1.Example.COM:8443":        "https://web-1.example.com:8443",
		"web-1.example.com.:80":                 "web-1.example.com:80",
		"http://localhost.":                     "http://localhost:80",
		"a_b.internal:80":                       "a_b.internal:80",
		"1and1.example:80":                      "1and1.example:80",
		"0xabc.example:80":                      "0xabc.example:80",
		"xn--bcher-kva.example:80":              "xn--bcher-kva.example:80",
		"http://[2001:DB8::1]":                  "http://[2001:db8::1]:80",
		"[2001:db8:0:0:0:0:0:1]:80":             "[2001:db8::1]:80",
		"https://[::1]:8443/":                   "https://[::1]:8443",
		"http://[::ffff:10.0.0.7]:80":           "http://10.0.0.7:80",
		"[::ffff:a00:7]:80":                     "10.0.0.7:80",
		"h:1":                                   "h:1",
		"h:65535":                               "h:65535",
		"h:00080":                               "h:80",
		strings.Repeat("a", 63) + ".example:80": strings.Repeat("a", 63) + ".example:80",
	} {
		e, err := ParseEndpoint(in)
		if err != nil {
			t.Errorf("%q: %v", in, err)
			continue
		}
		if e.String() != want {
			t.Errorf("%q: got %q, want %q", in, e, want)
		}
		host, port, err := net.SplitHostPort(e.Address())
		if err != nil || host != e.Host() || port != strconv.Itoa(e.Port()) {
			t.Errorf("%q: address %q, host %q, port %d, %v", in, e.Address(), e.Host(), e.Port(), err)
		}
	}
}

func TestParseEndpointRejects(t *testing.T) {
	for in, reason := range map[string]string{
		"":                              "it is empty",
		"h":                             "the port is missing",
		"10.0.0.7":                      "the port is missing",
		"[::1]":                         "the port is missing",
		"http://h/base":                 "a path",
		"http://h//":                    "a path",
		"http://h/%2f":                  "a path",
		"http://http://h":               "a path",
		"h:80/base":                     "want http://host:port",
		"h:80/":                         "want http://host:port",
		"//h:80":                        "want http://host:port",
		"http://h?x":                    "a query",
		"http://h?":                     "a query",
		"http://h/?x=1":                 "a query",
		"h:80?x":                        "want http://host:port",
		"http://h#x":                    "a fragment",
		"http://h#":                     "a fragment",
		"h:80#x":                        "want http://host:port",
		"http://user@h":                 "user info",
		"http://user:pw@h:80":           "user info",
		"http://@h:80":                  "user info",
		"user:pw@h:80":                  "want http://host:port",
		"ftp://h:80":                    "the scheme must be",
		"h2c://h:80":                    "the scheme must be",
		"://h:80":                       "the scheme must be",
		" http://h":                     "only printable ASCII",
		"http:h:80":                     "goes in brackets",
		"http:/h:80":                    "want http://host:port",
		"h:80-90":                       "the port must be",
		"http://h:80-90":                "",
		"h:0":                           "the port must be",
		"h:65536":                       "the port must be",
		"h:99999999999999999999":        "the port must be",
		"h:+80":                         "the port must be",
		"http://h:+80":                  "",
		"h:-80":                         "the port must be",
		"h:0x50":                        "the port must be",
		"h:8_0":                         "the port must be",
		"h:http":                        "the port must be",
		"h:":                            "the port must be",
		"http://h:":                     "the port must be",
		":80":                           "the host is missing",
		"http://:80":                    "the host is missing",
		"http://":                       "the host is missing",
		"http:///":                      "the host is missing",
		"unix//run/admin.sock":          "want http://host:port",
		"unix:///run/admin.sock":        "the scheme must be",
		"unix+h2c//run/x":               "want http://host:port",
		"{env.SECRET}:80":               "placeholders",
		"http://h:{port}":               "placeholders",
		"h}:80":                         "placeholders",
		"http://h/{x}":                  "placeholders",
		"[fe80::1%eth0]:80":             "a zone",
		"http://[fe80::1%25eth0]:80":    "a zone",
		"[::ffff:10.0.0.7%eth0]:80":     "",
		"http://[fe80::1%eth0]:80":      "",
		"::1:80":                        "goes in brackets",
		"http://::1:80":                 "",
		"[::1:80":                       "the bracket is not closed",
		"[::1]80":                       "the port must be",
		"[::1]:":                        "the port must be",
		"[::1]x:80":                     "the port must be",
		"[10.0.0.7]:80":                 "brackets are for IPv6",
		"[h]:80":                        "brackets are for IPv6",
		"[h:x]:80":                      "not a host name",
		"[]:80":                         "brackets are for IPv6",
		"127.1:80":                      "not an IPv4 address in its usual form",
		"0177.0.0.1:80":                 "not an IPv4 address in its usual form",
		"0x7f.0.0.1:80":                 "not an IPv4 address in its usual form",
		"http://2130706433":             "not an IPv4 address in its usual form",
		"http://017700000001":           "not an IPv4 address in its usual form",
		"http://0X7F000001/":            "not an IPv4 address in its usual form",
		"http://0x":                     "not an IPv4 address in its usual form",
		"127.0.0.1.:80":                 "not an IPv4 address in its usual form",
		"256.0.0.1:80":                  "not an IPv4 address in its usual form",
		"1.2.3.0x4:80":                  "not an IPv4 address in its usual form",
		"http://%31%32%37.0.0.1":        "",
		"http://%E6%AC%A7:80":           "not a host name",
		"a b:80":                        "only printable ASCII",
		"h:80\n":                        "only printable ASCII",
		"h\x00:80":                      "only printable ASCII",
		"h\x7f:80":                      "only printable ASCII",
		"bücher.example:80":             "only printable ASCII",
		"\xff:80":                       "only printable ASCII",
		"h..example:80":                 "not a host name",
		"h.example..:80":                "not a host name",
		".h:80":                         "not a host name",
		".:80":                          "1 to 253 characters",
		"-h:80":                         "not a host name",
		"h-:80":                         "not a host name",
		"h*:80":                         "not a host name",
		"h,i:80":                        "not a host name",
		`http://h\@evil:80`:             "",
		`h\i:80`:                        "want http://host:port",
		"h$(id):80":                     "not a host name",
		strings.Repeat("a", 64) + ":80": "not a host name",
		strings.Repeat("a.", 127) + "bcd.example:80": "1 to 253 characters",
	} {
		e, err := ParseEndpoint(in)
		if err == nil {
			t.Errorf("%q was accepted as %q", in, e)
			continue
		}
		if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), reason) {
			t.Errorf("%q: %v, want ErrInvalid and %q", in, err, reason)
		}
		if e != (Endpoint{}) {
			t.Errorf("%q: rejected with %+v", in, e)
		}
	}
}

// What a refused endpoint carries beyond its address may be a secret, and the
// message goes to logs and to the admin API.
func TestParseEndpointErrorKeepsSecrets(t *testing.T) {
	for _, s := range []string{
		"http://user:s3cret@h:80", "http://s3cret@h:80", "user:s3cret@h:80", "redis://:s3cret@h:6379", "http://a:s3cret@b:80@h:80",
		"http://h/?token=s3cret", "h:80?s3cret", "http://h:80#s3cret", "http://a:s3cret@h:{x}", "http://user:s3cret@h:99999",
		"http://h/?a=b@c&token=s3cret", "http://s3cret:%zz@h", "http://s3cret?x@h",
	} {
		_, err := ParseEndpoint(s)
		if err == nil {
			t.Errorf("%q was accepted", s)
		} else if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: %v", s, err)
		}
	}
}

func TestEndpointZero(t *testing.T) {
	var e Endpoint
	if e.Address() != "" || e.Host() != "" || e.Port() != 0 || e.String() != "" {
		t.Errorf("the zero Endpoint is %q, %q, %d, %q", e.Address(), e.Host(), e.Port(), e)
	}
}

func FuzzParseEndpoint(f *testing.F) {
	for _, s := range []string{
		"http://10.0.0.7:5001", "https://h/", "h:80", "http://[::1]:80/", "[::ffff:1.2.3.4]:080", "HTTP://A.b.:1",
		"http://user:pw@h:80", "unix//run/x.sock", "{env.X}:80", "[fe80::1%25eth0]:80", "0x7f.1:80", "http://%41:80", "h:80-90",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		e, err := ParseEndpoint(s)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatalf("%v does not wrap ErrInvalid", err)
			}
			if e != (Endpoint{}) {
				t.Fatalf("%q: rejected with %+v", s, e)
			}
			return
		}
		again, err := ParseEndpoint(e.String())
		if err != nil || again != e {
			t.Fatalf("%q parses to %q, which parses to %q, %v", s, e, again, err)
		}
		if e.Scheme != "" && e.Scheme != "http" && e.Scheme != "https" {
			t.Fatalf("%q: scheme %q", s, e.Scheme)
		}
		host, port, err := net.SplitHostPort(e.Address())
		if err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 || strconv.Itoa(n) != port {
			t.Fatalf("%q: port %q", s, port)
		}
		if addr, err := netip.ParseAddr(host); err == nil {
			if addr.Is4In6() || addr.Zone() != "" || addr.String() != host {
				t.Fatalf("%q: address %q is not in its one form", s, host)
			}
			return
		}
		if strings.Trim(host, "abcdefghijklmnopqrstuvwxyz0123456789-_.") != "" {
			t.Fatalf("%q: host %q", s, host)
		}
	})
}
