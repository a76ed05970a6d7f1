package discovery

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// An Endpoint is where a node serves: one TCP socket and, where the record
// names one, a scheme. The zero Endpoint is invalid.
type Endpoint struct {
	// Scheme is "http", "https", or "" for a bare host:port, which fits both.
	Scheme string

	address string // host:port, the host in lower case, an IPv6 address in brackets
}

// ParseEndpoint reads "http://host:port", "https://host:port" or "host:port";
// a missing port is the scheme's. Anything that could make a proxy do more than
// dial one socket is refused: a path other than "/", user info, a query, a
// fragment, another scheme, a port range, a unix socket, a placeholder, a zone,
// and numbers that some resolvers read as an IPv4 address although they are not
// written as one (https://url.spec.whatwg.org/#ends-in-a-number-checker). The
// error wraps [ErrInvalid], and [ErrForbidden] unless nothing is named at all.
func ParseEndpoint(s string) (Endpoint, error) {
	refuse := func(why string) (Endpoint, error) {
		return Endpoint{}, Forbid(Invalidf(FaultEndpoint, "endpoint %q: %s", Clip(RedactURL(s)), why))
	}
	const accepted = "want http://host:port, https://host:port or host:port"
	if s == "" {
		return Endpoint{}, Invalidf(FaultEndpoint, "endpoint %q: it is empty; %s", s, accepted)
	}
	for _, r := range s {
		if r == '{' || r == '}' {
			return refuse("placeholders are not accepted")
		}
		if r <= ' ' || r >= 0x7f {
			return refuse("only printable ASCII is accepted; write an international name in its xn-- form")
		}
	}

	var scheme, hostport string
	if before, after, found := strings.Cut(s, "://"); found {
		scheme = strings.ToLower(before)
		if scheme != "http" && scheme != "https" {
			return refuse("the scheme must be http or https")
		}
		u, err := url.Parse(scheme + "://" + after)
		switch {
		case err != nil:
			return refuse(accepted)
		case u.User != nil:
			return refuse("user info is not accepted")
		case u.RawQuery != "" || u.ForceQuery:
			return refuse("a query is not accepted")
		case u.Fragment != "" || strings.Contains(after, "#"):
			return refuse("a fragment is not accepted")
		case u.Path != "" && u.Path != "/":
			return refuse("a path is not accepted")
		}
		hostport = u.Host
	} else {
		if strings.ContainsAny(s, "/?#@\\") {
			return refuse(accepted)
		}
		hostport = s
	}

	host, port, err := splitHostPort(hostport)
	if err != nil {
		return refuse(err.Error())
	}
	if port == "" {
		switch scheme {
		case "http":
			port = "80"
		case "https":
			port = "443"
		default:
			return refuse("the port is missing; " + accepted)
		}
	}
	number, err := strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 || port[0] == '+' {
		return refuse("the port must be one number from 1 to 65535")
	}
	host, err = canonicalHost(host)
	if err != nil {
		return refuse(err.Error())
	}
	return Endpoint{Scheme: scheme, address: net.JoinHostPort(host, strconv.FormatUint(number, 10))}, nil
}

// Address returns "host:port", ready to be dialled.
func (e Endpoint) Address() string { return e.address }

// Host returns the host without the brackets of an IPv6 address.
func (e Endpoint) Host() string {
	host, _, _ := net.SplitHostPort(e.address)
	return host
}

// Port returns the port, 0 for the zero Endpoint.
func (e Endpoint) Port() int {
	_, port, _ := net.SplitHostPort(e.address)
	n, _ := strconv.Atoi(port)
	return n
}

// String returns the endpoint as a record spells it.
func (e Endpoint) String() string {
	if e.Scheme == "" {
		return e.address
	}
	return e.Scheme + "://" + e.address
}

// splitHostPort is net.SplitHostPort with an optional port.
func splitHostPort(s string) (host, port string, err error) {
	rest := s
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']')
		if end < 0 {
			return "", "", fmt.Errorf("the bracket is not closed")
		}
		host, rest = s[1:end], s[end+1:]
		if !strings.Contains(host, ":") {
			return "", "", fmt.Errorf("brackets are for IPv6 addresses")
		}
	} else {
		colon := strings.IndexByte(s, ':')
		if colon < 0 {
			return s, "", nil
		}
		host, rest = s[:colon], s[colon:]
		if strings.Contains(rest[1:], ":") {
			return "", "", fmt.Errorf("an IPv6 address goes in brackets")
		}
	}
	if rest == "" {
		return host, "", nil
	}
	if rest[0] != ':' || rest == ":" {
		return "", "", fmt.Errorf("the port must be one number from 1 to 65535")
	}
	return host, rest[1:], nil
}

// canonicalHost returns the one spelling under which a host is dialled and
// compared.
func canonicalHost(host string) (string, error) {
	if host == "" {
		return "", fmt.Errorf("the host is missing")
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.Zone() != "" {
			return "", fmt.Errorf("a zone is not accepted")
		}
		return addr.Unmap().String(), nil
	}
	host = strings.ToLower(strings.TrimSuffix(host, "."))
	if host == "" || len(host) > 253 {
		return "", fmt.Errorf("the host name must have 1 to 253 characters")
	}
	labels := strings.Split(host, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return "", fmt.Errorf("%q is not a host name", Clip(host))
		}
		for _, c := range []byte(label) {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return "", fmt.Errorf("%q is not a host name", Clip(host))
			}
		}
	}
	if last := labels[len(labels)-1]; isNumeric(last) {
		return "", fmt.Errorf("%q is not an IPv4 address in its usual form", Clip(host))
	}
	return host, nil
}

// isNumeric reports whether a resolver could read the label as a number.
func isNumeric(label string) bool {
	if strings.Trim(label, "0123456789") == "" {
		return true
	}
	hex, found := strings.CutPrefix(label, "0x")
	return found && strings.Trim(hex, "0123456789abcdef") == ""
}
