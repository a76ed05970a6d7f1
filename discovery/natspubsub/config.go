package natspubsub

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
)

// The defaults of a Config.
const (
	DefaultSubjectPrefix = "catga.nodes"
	DefaultListen        = discovery.DefaultHeartbeat
)

// Scheme is that of URLs that mean this kind of registry, and no other on the
// same servers. nats://, tls://, ws:// and wss:// are accepted as well.
const Scheme = "nats+pubsub"

// A Config names one subject prefix. The zero Config is the default prefix on a server
// on this machine.
type Config struct {
	// URLs are the servers of one cluster, nats://, tls://, ws:// or wss://, with or
	// without user info. The path of a URL names the prefix:
	// nats+pubsub://127.0.0.1:4222/catga.nodes. Default: nats://127.0.0.1:4222.
	URLs []string
	// Conn is how to be let in by the servers. Default: without a login.
	Conn natsconn.Options

	// SubjectPrefix goes before ".join", ".heartbeat", ".leave" and ".query".
	// It is one or more tokens of a subject, without wildcards.
	// Default: DefaultSubjectPrefix.
	SubjectPrefix string

	// Listen is how long a listing lasts at most: a heartbeat of the fleet, in
	// which every node that lives has been heard once. Default: DefaultListen.
	Listen time.Duration
}

const maxSubjectPrefix = 200

// Resolve returns the configuration as it is meant: the prefix taken out of the
// URLs' paths, their scheme turned into that of the connection, and every default
// filled in. Two configurations that mean the same fleet resolve to equal ones. The
// error wraps [discovery.ErrInvalid] and names what is wrong and what is accepted.
func (c Config) Resolve() (Config, error) {
	conn, prefix, err := c.conn().Resolve("subject prefix", c.SubjectPrefix)
	if err != nil {
		return Config{}, err
	}
	c.URLs, c.SubjectPrefix = conn.URLs, cmp.Or(prefix, DefaultSubjectPrefix)
	c.Listen = cmp.Or(c.Listen, DefaultListen)
	switch {
	case !validPrefix(c.SubjectPrefix):
		return Config{}, fmt.Errorf(`%w NATS subject prefix %q: want at most %d bytes, words with "." between them, without spaces, * and >, and not those of the server ($…, _INBOX)`,
			discovery.ErrInvalid, discovery.Clip(c.SubjectPrefix), maxSubjectPrefix)
	case c.Listen < stall:
		return Config{}, fmt.Errorf("%w NATS listen %q: want at least %v", discovery.ErrInvalid, c.Listen, stall)
	}
	return c, nil
}

// String names the prefix and the servers, and no secret:
// "nats+pubsub://10.0.0.5:4222/catga.nodes".
func (c Config) String() string {
	if resolved, err := c.Resolve(); err == nil {
		c = resolved
	}
	return Scheme + "://" + strings.Join(c.Addresses(), ",") + "/" + c.SubjectPrefix
}

// Addresses returns the "host:port" of every URL, without user info, in the order
// given; nil if one cannot be read.
func (c Config) Addresses() []string { return c.conn().Addresses() }

// conn returns what to dial, with the schemes that package natslink has.
func (c Config) conn() natslink.Config {
	urls := slices.Clone(c.URLs)
	for i, raw := range urls {
		if scheme, rest, found := strings.Cut(raw, "://"); found && strings.EqualFold(scheme, Scheme) {
			urls[i] = "nats://" + rest
		}
	}
	return natslink.Config{URLs: urls, Options: c.Conn}
}

// GoString is String, so that no way of printing shows a secret.
func (c Config) GoString() string { return c.String() }

// validPrefix reports whether messages can be published under the prefix.
func validPrefix(prefix string) bool {
	first, _, _ := strings.Cut(prefix, ".")
	return natslink.ValidPrefix(prefix, maxSubjectPrefix) && utf8.ValidString(prefix) &&
		!slices.Contains([]string{"_INBOX", "_R_", "_GR_"}, first) &&
		!strings.ContainsFunc(prefix, func(c rune) bool { return unicode.IsSpace(c) || unicode.IsControl(c) })
}

// The subjects of a fleet.
func (c *Config) join() string      { return c.SubjectPrefix + ".join" }
func (c *Config) heartbeat() string { return c.SubjectPrefix + ".heartbeat" }
func (c *Config) leave() string     { return c.SubjectPrefix + ".leave" }
func (c *Config) query() string     { return c.SubjectPrefix + ".query" }
