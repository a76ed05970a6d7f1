package redis

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/tlsfiles"
)

// Modes of a [Config].
const (
	// ModeSingle is one server, at an address that does not change.
	ModeSingle = "single"
	// ModeSentinel is the master that Sentinels name, also after a failover.
	ModeSentinel = "sentinel"
	// ModeCluster is a Redis Cluster.
	ModeCluster = "cluster"
)

// Values of SentinelTLS of a [Config].
const (
	// TLSOn has the Sentinels speak TLS.
	TLSOn = "on"
	// TLSOff has them speak without.
	TLSOff = "off"
)

// Layouts of a [Config]; the package's documentation describes them.
const (
	// LayoutSortedSet is one sorted set whose members are the records.
	LayoutSortedSet = "sorted_set"
	// LayoutKeys is one string key for each node.
	LayoutKeys = "keys"
)

// Defaults of a [Config].
const (
	// DefaultKey is the key under which the fleets in the wild list themselves.
	DefaultKey = "catga:nodes"
	// DefaultPoll is how often what nobody tells of is looked at.
	DefaultPoll = time.Second
	// DefaultHistory is how many changes are kept for each node, about.
	DefaultHistory = 10
	// DefaultSentinelMaster is the name in the configuration that Redis ships.
	DefaultSentinelMaster = "mymaster"
)

const (
	defaultPort         = "6379"
	defaultSentinelPort = "26379"
	minPoll             = 10 * time.Millisecond
	maxKey              = 1 << 10
)

// A Config says where a registry is and how it is laid out. The zero value is
// the sorted set catga:nodes of a server on this machine. Its methods may be called
// concurrently.
type Config struct {
	// URLs are redis://, rediss://, redis+sentinel:// or redis+cluster://
	// (the last two with rediss as well) with user, password and, as path, the
	// number of the database; all must agree. A single server has one URL; for
	// Sentinel they name Sentinels, while user and password are those of the
	// servers; a Cluster is found from any one of its servers. Default:
	// redis://127.0.0.1:6379.
	URLs []string
	// Mode is ModeSingle, ModeSentinel or ModeCluster. Default: by scheme.
	Mode string
	// Key is the sorted set, or with LayoutKeys the prefix of the keys, with or
	// without the colon at its end. Default: DefaultKey.
	Key string
	// Layout is LayoutSortedSet, the default, or LayoutKeys.
	Layout string
	// Poll is how often to look for changes of writers that announce none, 10 ms or
	// more. Default: DefaultPoll.
	Poll time.Duration
	// History is how many changes are kept for each node, about; 1 or more. Default:
	// DefaultHistory. LayoutKeys keeps none.
	History int

	// Username and Password log in to the servers. A password alone is the
	// default user's.
	Username, Password string
	// DB is the number of the database. A Cluster has only 0. Default: 0.
	DB int

	// SentinelMaster is the name under which Sentinels know the master.
	// Default: DefaultSentinelMaster.
	SentinelMaster string
	// SentinelUsername and SentinelPassword log in to the Sentinels.
	SentinelUsername, SentinelPassword string
	// SentinelTLS is TLSOn or TLSOff, where the Sentinels differ from the servers in
	// that. If it is given the scheme of the URLs says what the servers speak:
	// redis+sentinel with TLSOn are servers without TLS and Sentinels with it,
	// rediss+sentinel with TLSOff the other way round. Default: as the servers.
	SentinelTLS string

	// TLSCA is a file with the authorities to trust, in PEM; TLSCert and TLSKey
	// are files with the client's certificate; TLSServerName is the name that
	// the servers' certificate must have. Any of them turns TLS on, to servers
	// and Sentinels alike. Files are read anew for each connection.
	TLSCA, TLSCert, TLSKey, TLSServerName string

	// Name is the name of the connections in CLIENT LIST. Default: none, since
	// not every user may set one.
	Name string
	// Protocol is the newest version of RESP to speak, 2 or 3, the default. A
	// server that does not know 3 is spoken to in 2 in any case.
	Protocol int
}

// Resolve returns the configuration with its URLs taken apart and its defaults
// filled in: two configurations of the same registry resolve to equal ones,
// however they are spelled. The error wraps [discovery.ErrInvalid].
func (c Config) Resolve() (Config, error) {
	for _, step := range []func(*Config) error{
		(*Config).checkChoices, (*Config).resolveURLs, (*Config).resolveMode, (*Config).resolveKey, (*Config).resolveRest,
	} {
		switch err := step(&c); {
		case errors.Is(err, discovery.ErrInvalid):
			return Config{}, fmt.Errorf("redis registry: %w", err)
		case err != nil:
			return Config{}, fmt.Errorf("%w redis registry: %w", discovery.ErrInvalid, err)
		}
	}
	return c, nil
}

// checkChoices checks the options that are one of a few words.
func (c *Config) checkChoices() error {
	for _, o := range []struct {
		name, value string
		accepted    []string
	}{
		{"mode", c.Mode, []string{"", ModeSingle, ModeSentinel, ModeCluster}},
		{"layout", c.Layout, []string{"", LayoutSortedSet, LayoutKeys}},
		{"sentinel_tls", c.SentinelTLS, []string{"", TLSOn, TLSOff}},
	} {
		if !slices.Contains(o.accepted, o.value) {
			return fmt.Errorf("%s %q: want %s", o.name, o.value, strings.Join(o.accepted[1:], ", "))
		}
	}
	return nil
}

// resolveURLs takes the URLs apart, whose parts must agree with each other and with the
// options.
func (c *Config) resolveURLs() error {
	if err := c.files().Validate(); err != nil {
		return err
	}
	var parts []urlParts
	for _, raw := range c.URLs {
		p, err := parseURL(raw)
		if err != nil {
			return err
		}
		parts = append(parts, p)
	}
	if len(parts) == 0 {
		parts = []urlParts{{host: "127.0.0.1"}}
	}
	if c.DB < 0 {
		return fmt.Errorf("db %q: want a number from 0", strconv.Itoa(c.DB))
	}
	db := strings.TrimPrefix(strconv.Itoa(c.DB), "0")
	for _, p := range parts {
		if p.mode != parts[0].mode || p.secure != parts[0].secure {
			return errors.New("URLs: all must have the same scheme")
		}
		if c.Mode != "" && p.mode != "" && c.Mode != p.mode {
			return fmt.Errorf("mode %s contradicts the scheme of %s", c.Mode, p.host)
		}
		c.Mode = cmp.Or(c.Mode, p.mode)
		for _, o := range []struct {
			name   string
			option *string
			url    string
		}{
			{"username", &c.Username, p.username},
			{"password", &c.Password, p.password},
			{"db", &db, p.db},
		} {
			if *o.option != "" && o.url != "" && *o.option != o.url {
				return fmt.Errorf("%s: the URL of %s has another one than the options or the URLs before it", o.name, p.host)
			}
			*o.option = cmp.Or(*o.option, o.url)
		}
	}
	c.DB, _ = strconv.Atoi(db) // "" is 0
	c.Mode = cmp.Or(c.Mode, ModeSingle)
	scheme, port := "redis", defaultPort
	// Files ask for TLS, unless it is said apart who speaks it.
	if parts[0].secure || c.files().Given() && c.SentinelTLS == "" {
		scheme = "rediss"
	}
	if c.Mode == ModeSentinel {
		port = defaultSentinelPort
	}
	c.URLs = nil
	for _, p := range parts {
		c.URLs = append(c.URLs, scheme+"://"+net.JoinHostPort(p.host, cmp.Or(p.port, port)))
	}
	slices.Sort(c.URLs)
	c.URLs = slices.Compact(c.URLs)
	return nil
}

// resolveMode checks what depends on the mode.
func (c *Config) resolveMode() error {
	if c.SentinelTLS == TLSOff && !c.secure() && c.files().Given() {
		return errors.New("sentinel_tls off: neither the Sentinels nor the servers speak TLS, and tls_ca, tls_client_auth or tls_server_name is given; servers with TLS are rediss+sentinel://")
	}
	switch {
	case c.Mode == ModeSingle && len(c.URLs) > 1:
		return errors.New("URLs: a single server has one; several need mode sentinel or cluster")
	case c.Mode == ModeCluster && c.DB != 0:
		return fmt.Errorf("db %d: a cluster has only database 0", c.DB)
	case c.Mode == ModeSentinel:
		c.SentinelMaster = cmp.Or(c.SentinelMaster, DefaultSentinelMaster)
		if c.sentinelsSecure() == c.secure() {
			c.SentinelTLS = "" // as the servers
		}
	case c.SentinelMaster != "" || c.SentinelUsername != "" || c.SentinelPassword != "" || c.SentinelTLS != "":
		return errors.New("sentinel_master, sentinel_username, sentinel_password and sentinel_tls need mode sentinel")
	}
	if c.Username != "" && c.Password == "" || c.SentinelUsername != "" && c.SentinelPassword == "" {
		return errors.New("username: it needs a password")
	}
	return nil
}

// resolveKey checks the layout's key.
func (c *Config) resolveKey() error {
	c.Layout, c.Key = cmp.Or(c.Layout, LayoutSortedSet), cmp.Or(c.Key, DefaultKey)
	if c.Layout == LayoutKeys {
		c.Key = strings.TrimSuffix(c.Key, ":")
	}
	switch {
	case c.Key == "" || len(c.Key) > maxKey:
		return fmt.Errorf("key: want 1 to %d bytes", maxKey)
	case !utf8.ValidString(c.Key) || strings.ContainsFunc(c.Key, unicode.IsControl):
		return errors.New("key: want UTF-8 without control characters")
	case !hasTag(c.Key) && strings.Contains(c.Key, "}"):
		// Its side keys could not be made to share its slot.
		return fmt.Errorf("key %q: a brace is for a hash tag, {…}", c.Key)
	}
	return nil
}

// resolveRest checks the remaining options, each by itself.
func (c *Config) resolveRest() error {
	c.Poll, c.History, c.Protocol = cmp.Or(c.Poll, DefaultPoll), cmp.Or(c.History, DefaultHistory), cmp.Or(c.Protocol, 3)
	switch {
	case c.Poll < minPoll:
		return fmt.Errorf("poll %v: want at least %v", c.Poll, minPoll)
	case c.History < 0:
		return fmt.Errorf("history %d: want a number from 1", c.History)
	case c.Protocol != 2 && c.Protocol != 3:
		return fmt.Errorf("protocol %d: want 2 or 3", c.Protocol)
	case strings.ContainsFunc(c.Name, func(r rune) bool { return r <= ' ' || r > '~' }):
		return errors.New("name: want printable ASCII without spaces")
	}
	return nil
}

// Addresses returns the host:port of every URL, nil if the configuration is
// invalid. Under Sentinel these are the Sentinels', and a Cluster may have more
// than are named.
func (c Config) Addresses() []string {
	c, err := c.Resolve()
	if err != nil {
		return nil
	}
	var addresses []string
	for _, u := range c.URLs {
		_, address, _ := strings.Cut(u, "://")
		addresses = append(addresses, address)
	}
	return addresses
}

// String names the registry, without a secret, such as
// "redis://127.0.0.1:6379/0/catga:nodes".
func (c Config) String() string {
	c, err := c.Resolve()
	if err != nil {
		return "redis (invalid)"
	}
	scheme, _, _ := strings.Cut(c.URLs[0], "://")
	if c.Mode != ModeSingle {
		scheme += "+" + c.Mode
	}
	name := scheme + "://" + strings.Join(c.Addresses(), ",")
	if c.Mode == ModeSentinel {
		name += "/" + c.SentinelMaster
	}
	name += "/" + strconv.Itoa(c.DB) + "/" + c.Key
	if c.Layout == LayoutKeys {
		name += ":*"
	}
	return name
}

// GoString is String, so that no way of printing shows a secret.
func (c Config) GoString() string { return c.String() }

// files are those that secure the connections.
func (c Config) files() tlsfiles.Files {
	return tlsfiles.Files{CA: c.TLSCA, Cert: c.TLSCert, Key: c.TLSKey, ServerName: c.TLSServerName}
}

// checkFiles reports what is wrong with the files that a connection would need.
func (c Config) checkFiles() error {
	if !c.secure() && !c.sentinelsSecure() {
		return nil
	}
	if _, err := c.files().Config(""); err != nil {
		return fmt.Errorf("redis registry: %w", err)
	}
	return nil
}

// secure reports whether the servers speak TLS.
func (c Config) secure() bool { return strings.HasPrefix(c.URLs[0], "rediss:") }

// sentinelsSecure reports whether the Sentinels do.
func (c Config) sentinelsSecure() bool {
	return c.SentinelTLS == TLSOn || c.secure() && c.SentinelTLS == ""
}

// side returns the name of a key beside the registry's own, in its slot.
func (c Config) side(name string) string {
	switch {
	case !hasTag(c.Key):
		return "{" + c.Key + "}:" + name
	case c.Layout == LayoutKeys:
		// With a colon it would be the key of the node of that name.
		return c.Key + "/" + name
	default:
		return c.Key + ":" + name
	}
}

// former returns the names that versions before gave to keys beside the registry's
// own, where those are others: they are also those of nodes.
func (c Config) former(names ...string) (keys []string) {
	if c.Layout == LayoutKeys && hasTag(c.Key) {
		for _, name := range names {
			keys = append(keys, c.Key+":"+name)
		}
	}
	return keys
}

// hasTag reports whether only a part of the key decides its slot
// (https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/#hash-tags).
func hasTag(key string) bool {
	_, rest, found := strings.Cut(key, "{")
	return found && strings.IndexByte(rest, '}') > 0
}

type urlParts struct {
	mode, host, port, username, password, db string
	secure                                   bool
}

// parseURL takes a URL apart. Its errors quote nothing of the URL but its
// scheme and host: what is malformed may well be a password.
func parseURL(raw string) (urlParts, error) {
	const accepted = "want redis://host:port/db, rediss://, redis+sentinel:// or redis+cluster://"
	var p urlParts
	scheme, _, found := strings.Cut(raw, "://")
	if !found {
		return p, fmt.Errorf("URL: %s", accepted)
	}
	protocol, mode, _ := strings.Cut(strings.ToLower(scheme), "+")
	switch protocol {
	case "redis":
	case "rediss":
		p.secure = true
	default:
		return p, fmt.Errorf("URL with the scheme %q: %s", discovery.RedactURL(protocol), accepted)
	}
	switch mode {
	case "", ModeSentinel, ModeCluster:
		p.mode = mode
	default:
		return p, fmt.Errorf("URL with the scheme %s+%q: %s", protocol, discovery.RedactURL(mode), accepted)
	}
	u, err := url.Parse(raw)
	if err != nil || strings.Contains(u.Host, ",") {
		return p, fmt.Errorf("%s URL: it cannot be read; %s; special characters of a password must be escaped, and every host has a URL of its own", scheme, accepted)
	}
	if u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		return p, fmt.Errorf("URL of %s: a query is not accepted; use the options", u.Host)
	}
	p.host, p.port = strings.ToLower(u.Hostname()), u.Port()
	if addr, err := netip.ParseAddr(p.host); err == nil {
		p.host = addr.Unmap().String()
	}
	if p.host == "" {
		return p, fmt.Errorf("%s URL: the host is missing; %s", scheme, accepted)
	}
	if p.port != "" {
		if n, err := strconv.ParseUint(p.port, 10, 16); err != nil || n == 0 {
			return p, fmt.Errorf("URL of %s: the port must be a number from 1 to 65535", p.host)
		}
	}
	if u.User != nil {
		p.username = u.User.Username()
		p.password, _ = u.User.Password()
	}
	if path := strings.Trim(u.Path, "/"); path != "" {
		n, err := strconv.ParseUint(path, 10, 31)
		if err != nil {
			return p, fmt.Errorf("URL of %s: the path names the database, a number", u.Host)
		}
		p.db = strconv.FormatUint(n, 10)
	}
	return p, nil
}
