package natslink

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/tlsfiles"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
)

// defaultURL is dialled where no URL is given.
const defaultURL = "nats://127.0.0.1:4222"

// A Config says where the servers of one cluster are and how they let us in. At
// most one login may be given, in the options or as user info in the URLs.
type Config struct {
	// URLs are nats://, tls://, ws:// or wss:// addresses, with or without user
	// info. Default: nats://127.0.0.1:4222.
	URLs []string
	natsconn.Options
}

// Resolve takes the name of what is meant, such as "bucket", out of the paths of
// the URLs, fills in the default URL, and validates the rest. name is what is named
// beside the URLs. The error wraps [discovery.ErrInvalid].
func (c Config) Resolve(what, name string) (resolved Config, named string, err error) {
	urls, err := c.parsed()
	if err != nil {
		return Config{}, "", err
	}
	c.URLs = nil
	for _, u := range urls {
		if path := strings.TrimPrefix(u.Path, "/"); path != "" {
			if name != "" && name != path {
				return Config{}, "", fmt.Errorf("%w NATS %s: both %q and, in the path of %s://%s, %q are named; name one",
					discovery.ErrInvalid, what, name, u.Scheme, u.Host, path)
			}
			name = path
		}
		u.Path, u.RawPath = "", ""
		c.URLs = append(c.URLs, u.String())
	}
	_, err = c.addresses()
	return c, name, err
}

// parsed returns the URLs, or the default one.
func (c Config) parsed() ([]*url.URL, error) {
	raw := c.URLs
	if len(raw) == 0 {
		raw = []string{defaultURL}
	}
	urls := make([]*url.URL, len(raw))
	for i := range raw {
		var err error
		if urls[i], err = ParseURL(raw[i]); err != nil {
			return nil, err
		}
	}
	return urls, nil
}

// Addresses returns the "host:port" of every URL, without user info, in the
// order given; nil if one cannot be read.
func (c Config) Addresses() []string {
	urls, err := c.parsed()
	if err != nil {
		return nil
	}
	hosts := make([]string, len(urls))
	for i, u := range urls {
		hosts[i] = u.Host
	}
	return hosts
}

// String names the servers, and no secret.
func (c Config) String() string { return strings.Join(c.Addresses(), ",") }

// GoString is String, so that no way of printing shows a secret.
func (c Config) GoString() string { return c.String() }

// defaultPorts are those of the schemes that URLs may have.
var defaultPorts = map[string]string{"nats": strconv.Itoa(nats.DefaultPort), "tls": strconv.Itoa(nats.DefaultPort), "ws": "80", "wss": "443"}

// ParseURL reads the URL of a server and adds the default port. Its path,
// which means something else to each backend, is returned as it stands. The
// error wraps [discovery.ErrInvalid] and shows nothing of any user info.
func ParseURL(raw string) (*url.URL, error) {
	refuse := func(why string) (*url.URL, error) {
		return nil, fmt.Errorf("%w NATS URL %q: %s", discovery.ErrInvalid, discovery.Clip(discovery.RedactURL(raw)), why)
	}
	if raw == "" {
		return refuse("it is empty; want nats://host:port")
	}
	scheme, rest, found := strings.Cut(raw, "://")
	if !found {
		return refuse("want nats://host:port, or tls://, ws:// or wss://")
	}
	scheme = strings.ToLower(scheme)
	defaultPort, known := defaultPorts[scheme]
	if !known {
		return refuse("the scheme must be nats, tls, ws or wss")
	}
	if strings.Contains(rest, ",") {
		return refuse("give each address as a URL of its own")
	}
	// The error of url.Parse quotes what it could not read, which may be part of
	// a password; so it is not passed on.
	u, err := url.Parse(raw)
	if err != nil || u.Opaque != "" {
		return refuse("want nats://host:port; special characters in user info must be percent-encoded")
	}
	if u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return refuse("a query or fragment is not accepted")
	}
	if u.Hostname() == "" {
		return refuse("the host is missing")
	}
	if host := u.Hostname(); strings.Contains(host, ":") {
		// url.Parse takes a host with a colon in it for one.
		if _, err := netip.ParseAddr(host); err != nil {
			return refuse("the host is no IPv6 address")
		}
	}
	port := cmp.Or(u.Port(), defaultPort)
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return refuse("the port must be a number from 1 to 65535")
	}
	u.Scheme, u.Host = scheme, net.JoinHostPort(u.Hostname(), port)
	return u, nil
}

// An address is one server to dial.
type address struct {
	url url.URL
	// tlsName is the name that its certificate must hold where that is not the
	// host of the URL: servers of a cluster tell their IP addresses, which
	// certificates rarely name.
	tlsName string
}

// String never shows user info.
func (a address) String() string { return a.url.Scheme + "://" + a.url.Host }

// addresses validates the configuration and returns what it names. It opens no file:
// files are read whenever a server is dialled, so that rotated ones are used.
func (c Config) addresses() ([]address, error) {
	var logins []string
	for _, login := range []struct{ option, value string }{
		{"credentials", c.Credentials},
		{"nkey", c.NKey},
		{"token", c.Token},
		{"user", c.User},
	} {
		if login.value != "" {
			logins = append(logins, login.option)
		}
	}
	if c.Password != "" && c.User == "" {
		return nil, fmt.Errorf("%w NATS options: a password without a user", discovery.ErrInvalid)
	}
	if err := c.files().Validate(); err != nil {
		return nil, err
	}
	if c.InboxPrefix != "" && !validInboxPrefix(c.InboxPrefix) {
		return nil, fmt.Errorf(`%w NATS inbox prefix %q: want at most %d bytes, such as _INBOX_proxy for a user who may subscribe to "_INBOX_proxy.>"`,
			discovery.ErrInvalid, discovery.Clip(c.InboxPrefix), maxInboxPrefix)
	}

	urls, err := c.parsed()
	if err != nil {
		return nil, err
	}
	var addresses []address
	for _, u := range urls {
		switch {
		case u.Path != "" && u.Path != "/":
			return nil, fmt.Errorf("%w NATS URL %q: a path is not accepted here", discovery.ErrInvalid, discovery.Clip(discovery.RedactURL(u.String())))
		case c.TLSHandshakeFirst && strings.HasPrefix(u.Scheme, "ws"):
			return nil, fmt.Errorf("%w NATS URL %q: a handshake first is only for nats:// and tls://; wss:// always begins with it", discovery.ErrInvalid, discovery.Clip(discovery.RedactURL(u.String())))
		}
		u.Path, u.RawPath = "", ""
		addresses = append(addresses, address{url: *u})
	}
	if slices.ContainsFunc(urls, func(u *url.URL) bool { return u.User != nil }) {
		logins = append(logins, "user info in a URL")
	}
	if len(logins) > 1 {
		return nil, fmt.Errorf("%w NATS options: only one of credentials, nkey, token, user and user info in a URL may be given, not %s",
			discovery.ErrInvalid, strings.Join(logins, " and "))
	}
	return addresses, nil
}

// login reads the files that let us in, and returns what the client needs.
// What is wrong with a file is an error that wraps [discovery.ErrInvalid] and
// names the file and nothing that is in it.
func (c Config) login() ([]nats.Option, error) {
	switch {
	case c.Credentials != "":
		data, err := os.ReadFile(c.Credentials)
		if err != nil {
			return nil, fmt.Errorf("%w NATS credentials: %w", discovery.ErrInvalid, err)
		}
		if _, err := nkeys.ParseDecoratedJWT(data); err != nil {
			return nil, fmt.Errorf("%w NATS credentials: %s holds no JWT of a user", discovery.ErrInvalid, c.Credentials)
		}
		if _, err := nkeys.ParseDecoratedUserNKey(data); err != nil {
			return nil, fmt.Errorf("%w NATS credentials: %s holds no seed of a user", discovery.ErrInvalid, c.Credentials)
		}
		return []nats.Option{nats.UserCredentialBytes(data)}, nil
	case c.NKey != "":
		data, err := os.ReadFile(c.NKey)
		if err != nil {
			return nil, fmt.Errorf("%w NATS nkey: %w", discovery.ErrInvalid, err)
		}
		pair, err := nkeys.ParseDecoratedUserNKey(data)
		if err != nil {
			return nil, fmt.Errorf("%w NATS nkey: %s holds no seed of a user (it begins with SU)", discovery.ErrInvalid, c.NKey)
		}
		public, err := pair.PublicKey()
		if err != nil {
			return nil, fmt.Errorf("%w NATS nkey: %s holds a broken seed", discovery.ErrInvalid, c.NKey)
		}
		return []nats.Option{nats.Nkey(public, pair.Sign)}, nil
	case c.Token != "":
		return []nats.Option{nats.Token(c.Token)}, nil
	case c.User != "":
		return []nats.Option{nats.UserInfo(c.User, c.Password)}, nil
	}
	return nil, nil
}

// tls returns the TLS configuration for a server, nil where nothing of the
// configuration asks for TLS. Files are read anew each time.
func (c Config) tls(a address) (*tls.Config, error) {
	if !c.files().Given() && !c.TLSHandshakeFirst && a.tlsName == "" && a.url.Scheme != "tls" && a.url.Scheme != "wss" {
		return nil, nil
	}
	return c.files().Config(cmp.Or(a.tlsName, a.url.Hostname()))
}

func (c Config) files() tlsfiles.Files {
	return tlsfiles.Files{CA: c.TLSCA, Cert: c.TLSCert, Key: c.TLSKey, ServerName: c.TLSServerName}
}

const maxInboxPrefix = 100

// inboxes returns what the subjects of answers begin with, with the dot.
func (c Config) inboxes() string {
	if c.InboxPrefix == "" {
		return nats.InboxPrefix
	}
	return c.InboxPrefix + "."
}

// validInboxPrefix reports whether answers can come on subjects under it.
func validInboxPrefix(prefix string) bool {
	return ValidPrefix(prefix, maxInboxPrefix) && !strings.ContainsFunc(prefix, func(r rune) bool { return r <= ' ' || r > '~' })
}

// ValidPrefix reports whether subjects may begin with a prefix, of so many bytes at
// most: words with "." between them, without wildcards, that are not the server's own.
func ValidPrefix(prefix string, most int) bool {
	return len(prefix) <= most && !strings.HasPrefix(prefix, "$") && !strings.ContainsAny(prefix, "*>") &&
		!slices.Contains(strings.Split(prefix, "."), "")
}
