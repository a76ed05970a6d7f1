package natskv

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// maxKey is the longest key that is written: some 5,000 bytes make the server
// drop the connection.
const maxKey = 1 << 10

var keyCharacters = regexp.MustCompile(`^[-/_=.A-Za-z0-9]+$`)

// validKey reports whether a bucket takes the key.
func validKey(key string) bool {
	return len(key) <= maxKey && keyCharacters.MatchString(key) &&
		key[0] != '.' && key[len(key)-1] != '.' && !strings.Contains(key, "..")
}

// escaped reports whether a character of an id does not stand for itself in a key. What
// does is less than what a key may hold: "." makes levels of a subject, "=" starts
// an escape, and "/" is left to those who write paths.
func escaped(c rune) bool {
	return (c < 'A' || c > 'Z') && (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_'
}

// encode returns an id as a key spells it: =HH for each byte of what is escaped.
func encode(id string) string {
	var b strings.Builder
	for i := range len(id) {
		if c := id[i]; escaped(rune(c)) {
			fmt.Fprintf(&b, "=%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// decode returns the id that encode spells so. It reports false for whatever
// encode would not have written.
func decode(name string) (id string, ok bool) {
	if !strings.ContainsFunc(name, escaped) {
		return name, discovery.ValidateID(name) == nil
	}
	// "%HH" means the same in a URL, and "%" stands in no key.
	id, err := url.PathUnescape(strings.ReplaceAll(name, "=", "%"))
	return id, err == nil && encode(id) == name && discovery.ValidateID(id) == nil
}

// key returns the key under which we write a node.
func (c *Config) key(id string) string { return c.KeyPrefix + encode(id) }

// idOf returns the id that a key names: what is encoded in it, or else what
// stands there.
func (c *Config) idOf(key string) string {
	name := c.nameOf(key)
	if id, ok := decode(name); ok {
		return id
	}
	return name
}

// names reports whether a record of that id may stand under the key: encoded,
// as we write it, or literally, as others do.
func (c *Config) names(key, id string) bool {
	return id == c.idOf(key) || id == c.nameOf(key) || id == key
}

// nameOf returns the key without its prefix, or a bare key whole.
func (c *Config) nameOf(key string) string {
	if name, found := strings.CutPrefix(key, c.KeyPrefix); found && name != "" {
		return name
	}
	return key
}

// keysOf returns every key under which a node may stand.
func (c *Config) keysOf(id string) []string {
	var keys []string
	for _, key := range []string{c.KeyPrefix + encode(id), c.KeyPrefix + id, encode(id), id} {
		if !slices.Contains(keys, key) && validKey(key) && c.names(key, id) {
			keys = append(keys, key)
		}
	}
	return keys
}
