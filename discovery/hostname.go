package discovery

import (
	"errors"
	"fmt"
	"net/netip"
	"path"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

const (
	// maxHostName is how long a host name may be as a record writes it: 253 characters
	// of DNS, each of four bytes.
	maxHostName = 4 * 253
	// maxHostPath is how long a path of a record may be in bytes.
	maxHostPath = 256

	wildcard = "*."
)

// AllPaths is the path of a node that serves all paths of its hosts.
const AllPaths = "/*"

// hostNames turns host names into the form in which DNS and certificates have them, as
// browsers do (UTS #46, not transitional).
var hostNames = idna.New(idna.MapForLookup(), idna.Transitional(false), idna.BidiRule(),
	idna.StrictDomainName(true), idna.VerifyDNSLength(false)) // canonicalHost verifies the length

// ParseHost returns the normal form of a host name: in lower case, in ASCII, without a
// dot at its end. One that begins with "*." stands for all names with one label in its
// place. IP addresses, ports, and names with a label of scripts that are not written
// together are no host names. The error wraps [ErrInvalid] and says why, without the
// name.
func ParseHost(s string) (string, error) {
	host, err := parseHost(s)
	if err != nil {
		return "", fmt.Errorf("%w host name: %w", ErrInvalid, err)
	}
	return host, nil
}

func parseHost(s string) (string, error) {
	rest, wild := strings.CutPrefix(s, wildcard)
	switch {
	case s == "":
		return "", errors.New("it is empty")
	case len(s) > maxHostName || tooLongLabel(s):
		return "", errors.New("it is too long")
	case strings.Contains(rest, "*"):
		return "", errors.New("a wildcard is *. and a host name, such as *.example.com")
	case strings.Contains(s, "/"):
		return "", errors.New("it is a URL or a path, want the host name alone")
	case isAddress(rest):
		return "", errors.New("it is an IP address")
	case strings.Contains(s, ":"):
		return "", errors.New("it has a port, want the host name alone")
	}
	host := rest
	if !isASCII(host) || strings.Contains(strings.ToLower(host), "xn--") {
		var err error
		if host, err = internationalHost(host); err != nil {
			return "", err
		}
	}
	host, err := canonicalHost(host)
	switch {
	case err != nil:
		return "", errors.New("it is no host name")
	case isAddress(host): // by now, of digits of another script
		return "", errors.New("it is an IP address")
	case wild:
		if len(host)+len(wildcard) > 253 {
			return "", errors.New("it is too long")
		}
		return wildcard + host, nil
	}
	return host, nil
}

// tooLongLabel reports whether a label has more characters than any that DNS takes:
// what IDNA costs grows with the square of that.
func tooLongLabel(s string) bool {
	for label := range strings.SplitSeq(s, ".") {
		if utf8.RuneCountInString(label) > 63 {
			return true
		}
	}
	return false
}

// isAddress reports whether somebody would take the name for an address: an IPv6 one in
// brackets, or one whose last label is a number, as browsers do.
func isAddress(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if strings.HasPrefix(s, "[") {
		return true
	}
	if i := strings.LastIndexByte(s, ':'); i >= 0 && strings.Count(s, ":") == 1 {
		s = s[:i]
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return true
	}
	last := s[strings.LastIndexByte(s, '.')+1:]
	return last != "" && isNumeric(strings.ToLower(last))
}

func isASCII(s string) bool {
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// internationalHost returns the ASCII form of a name that is written in either form. Both
// forms must mean the same, and no label may mix scripts as browsers do not show it.
func internationalHost(s string) (string, error) {
	ascii, err := hostNames.ToASCII(strings.TrimSuffix(s, "."))
	if err != nil {
		return "", errors.New("it is no internationalized host name")
	}
	written, err := hostNames.ToUnicode(ascii)
	if again, err2 := hostNames.ToASCII(written); err != nil || err2 != nil || again != ascii {
		return "", errors.New("it is no internationalized host name")
	}
	for label := range strings.SplitSeq(written, ".") {
		if !isASCII(label) && !writtenTogether(label) {
			return "", errors.New("it mixes letters of scripts that look alike and are not written together")
		}
	}
	return ascii, nil
}

// A scriptSet is a set of the scripts below.
type scriptSet uint16

const (
	latin scriptSet = 1 << iota
	han
	kana
	bopomofo
	hangul
	greek
	cyrillic
	armenian
	otherScript
)

var scripts = []struct {
	is    scriptSet
	table *unicode.RangeTable
}{
	{latin, unicode.Latin},
	{han, unicode.Han},
	{kana, unicode.Hiragana},
	{kana, unicode.Katakana},
	{hangul, unicode.Hangul},
	{bopomofo, unicode.Bopomofo},
	{greek, unicode.Greek},
	{cyrillic, unicode.Cyrillic},
	{armenian, unicode.Armenian},
	{0, unicode.Common},
	{0, unicode.Inherited},
}

// writtenTogether reports whether the letters of a label are of one script, or of those
// of which Chinese, Japanese and Korean texts consist: "highly restrictive" of UTS #39,
// which browsers and registries of names follow. Scripts that are none of those with
// letters that look like Latin ones count as one.
func writtenTogether(label string) bool {
	var has scriptSet
	for _, r := range label {
		has |= scriptOf(r)
	}
	return has&(has-1) == 0 || has&^(latin|han|kana) == 0 || has&^(latin|han|bopomofo) == 0 || has&^(latin|han|hangul) == 0
}

func scriptOf(r rune) scriptSet {
	for _, s := range scripts {
		if unicode.Is(s.table, r) {
			return s.is
		}
	}
	return otherScript
}

// RequestHost returns the normal form of the host that a request names, such as its
// header Host, with or without a port. It never fails: what is no host name is no name
// that a node could have. Of a name that is in normal form it is a part, without a copy.
func RequestHost(hostport string) string {
	host := hostport
	if i := strings.LastIndexByte(host, ':'); i >= 0 && host[0] != '[' {
		host = host[:i]
	}
	host = strings.TrimSuffix(host, ".")
	for i := range len(host) {
		if c := host[i]; c >= utf8.RuneSelf || c == 'x' && strings.HasPrefix(host[i:], "xn--") {
			// Two forms of a name that mean the same have one normal form.
			normal, err := parseHost(host)
			if err != nil {
				return ""
			}
			return normal
		} else if c >= 'A' && c <= 'Z' {
			return RequestHost(strings.ToLower(host))
		}
	}
	return host
}

// ParsePath returns the normal form of a path of a record: "/api/*" stands for "/api"
// and whatever is below it, and may be written "/api" or "/api/"; [AllPaths] for all. It
// is in lower case, since Caddy's matchers of paths make no difference either. The error
// wraps [ErrInvalid] and says why, without the path.
func ParsePath(s string) (string, error) {
	prefix, err := parsePath(s)
	if err != nil {
		return "", fmt.Errorf("%w path: %w", ErrInvalid, err)
	}
	return prefix + AllPaths, nil
}

// parsePath returns the path without what stands for all that is below it, and without
// a slash at its end: "" for all paths.
func parsePath(s string) (string, error) {
	prefix := strings.TrimSuffix(strings.TrimSuffix(s, "*"), "/")
	switch {
	case len(s) > maxHostPath:
		return "", fmt.Errorf("it has more than %d bytes", maxHostPath)
	case !strings.HasPrefix(s, "/"):
		return "", errors.New("it does not begin with a slash")
	case strings.HasSuffix(s, "*") && !strings.HasSuffix(s, "/*"), strings.Contains(prefix, "*"):
		return "", errors.New("a wildcard stands at the end only, behind a slash, such as /api/*")
	case strings.ContainsAny(s, "?#%\\"):
		return "", errors.New("it is a plain path, without ?, #, % and \\")
	case prefix != "" && (path.Clean(prefix) != prefix || prefix == "/"):
		return "", errors.New("a part of it is empty, or consists of dots")
	}
	return strings.ToLower(prefix), nil
}

// requestPath returns a request's path in the form in which paths are compared.
func requestPath(p string) string {
	if strings.Contains(p, "//") || strings.Contains(p, "/.") {
		p = path.Clean(p) // a slash at the end makes no difference
	}
	return strings.ToLower(p)
}
