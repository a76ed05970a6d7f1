package natskv

import (
	"cmp"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/internal/natslink"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
)

// The defaults of a Config.
const (
	DefaultBucket    = "catga_nodes"
	DefaultKeyPrefix = "node."
	DefaultBucketTTL = 5 * time.Minute
	DefaultHistory   = 10
	DefaultMaxBytes  = 10 << 20
)

// Kinds of storage for a bucket that is created.
const (
	StorageFile   = "file"
	StorageMemory = "memory"
)

// A Config names one bucket. The zero Config is the default bucket of a server on
// this machine.
type Config struct {
	// URLs are the servers of one cluster, nats://, tls://, ws:// or wss://, with or
	// without user info. The path of a URL names the bucket:
	// nats://127.0.0.1:4222/catga_nodes. Default: nats://127.0.0.1:4222.
	URLs []string
	// Conn is how to be let in by the servers. Default: without a login.
	Conn natsconn.Options

	// Bucket is the bucket's name, of letters, digits, "-" and "_".
	// Default: DefaultBucket.
	Bucket string
	// KeyPrefix goes before the id in the key of a node. Keys without it are
	// read as bare ids. Default: DefaultKeyPrefix.
	KeyPrefix string
	// Domain is the JetStream domain of the bucket. Default: that of the
	// server we are connected to.
	Domain string

	// NoCreate makes a bucket that does not exist an error. Otherwise it is
	// created, with the values that follow; a bucket that exists is used as it
	// is and never changed.
	NoCreate bool
	// BucketTTL is how long the bucket keeps a record that nobody renews.
	// Default: DefaultBucketTTL.
	BucketTTL time.Duration
	// History is how many revisions are kept of each key, 1 to 64.
	// Default: DefaultHistory.
	History int
	// MaxBytes bounds the size of the bucket; -1 does not.
	// Default: DefaultMaxBytes.
	MaxBytes int64
	// Storage is StorageFile or StorageMemory. Default: StorageFile.
	Storage string
	// Replicas is how many servers keep the bucket, 1 to 5.
	// Default: 1, or the least that the account allows.
	Replicas int
}

var (
	validBucket = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)
	validDomain = regexp.MustCompile(`^[^\s.*>]+$`)
)

const (
	maxBucket    = 200 // a stream's name becomes the name of a folder
	maxKeyPrefix = 128
	streamPrefix = "KV_" // makes the name of a stream out of that of a bucket
)

// Resolve returns the configuration as it is meant: the bucket taken out of the
// URLs' paths, and every default filled in. Two configurations that mean the
// same bucket resolve to equal ones. The error wraps [discovery.ErrInvalid] and
// names what is wrong and what is accepted.
func (c Config) Resolve() (Config, error) {
	conn, bucket, err := c.conn().Resolve("bucket", c.Bucket)
	if err != nil {
		return Config{}, err
	}
	c.URLs, c.Bucket = conn.URLs, cmp.Or(bucket, DefaultBucket)
	c.KeyPrefix = cmp.Or(c.KeyPrefix, DefaultKeyPrefix)
	c.BucketTTL = cmp.Or(c.BucketTTL, DefaultBucketTTL)
	c.History = cmp.Or(c.History, DefaultHistory)
	c.MaxBytes = cmp.Or(c.MaxBytes, DefaultMaxBytes)
	c.Storage = cmp.Or(c.Storage, StorageFile)
	refuse := func(option string, value any, accepted string) (Config, error) {
		return Config{}, fmt.Errorf("%w NATS %s %q: want %s", discovery.ErrInvalid, option, fmt.Sprint(value), accepted)
	}
	switch {
	case !validBucket.MatchString(c.Bucket) || len(c.Bucket) > maxBucket:
		return refuse("bucket", c.Bucket, fmt.Sprintf("1 to %d letters, digits, - and _", maxBucket))
	case len(c.KeyPrefix) > maxKeyPrefix || !validKey(c.KeyPrefix+"x"):
		return refuse("key prefix", c.KeyPrefix,
			fmt.Sprintf(`at most %d letters, digits and -/_=. characters, no "." at the start and no ".."`, maxKeyPrefix))
	case c.Domain != "" && !validDomain.MatchString(c.Domain):
		return refuse("domain", c.Domain, "one name without dots, wildcards and spaces")
	case c.BucketTTL < time.Second:
		return refuse("bucket TTL", c.BucketTTL, "at least 1s")
	case c.History < 1 || c.History > jetstream.KeyValueMaxHistory:
		return refuse("history", c.History, fmt.Sprintf("a number from 1 to %d", jetstream.KeyValueMaxHistory))
	case c.MaxBytes < -1:
		return refuse("max bytes", c.MaxBytes, "a size, or -1 for no bound")
	case c.Storage != StorageFile && c.Storage != StorageMemory:
		return refuse("storage", c.Storage, StorageFile+" or "+StorageMemory)
	case c.Replicas < 0 || c.Replicas > 5:
		return refuse("replicas", c.Replicas, "a number from 1 to 5")
	}
	return c, nil
}

// String names the bucket and its servers, and no secret:
// "nats_kv://10.0.0.5:4222/catga_nodes".
func (c Config) String() string {
	if resolved, err := c.Resolve(); err == nil {
		c = resolved
	}
	return "nats_kv://" + strings.Join(c.Addresses(), ",") + "/" + c.Bucket
}

// Addresses returns the "host:port" of every URL, without user info, in the order
// given; nil if one cannot be read.
func (c Config) Addresses() []string { return c.conn().Addresses() }

func (c Config) conn() natslink.Config { return natslink.Config{URLs: c.URLs, Options: c.Conn} }

// GoString is String, so that no way of printing shows a secret.
func (c Config) GoString() string { return c.String() }

// stream is the name of the stream that holds the bucket.
func (c *Config) stream() string { return streamPrefix + c.Bucket }

// overridesBucket is the name of the bucket of the overrides.
func (c *Config) overridesBucket() string { return c.Bucket + "_overrides" }

// overridesStream is the name of its stream.
func (c *Config) overridesStream() string { return streamPrefix + c.overridesBucket() }
