package backend

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"math"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/redis"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

func init() {
	// The client library otherwise writes to standard error, past Caddy's log. It
	// has one logger for the whole process. What matters comes back as an error
	// as well, so this is for debugging only.
	goredis.SetLogger(redisLogger{})
}

type redisLogger struct{}

func (redisLogger) Printf(_ context.Context, format string, v ...any) {
	caddy.Log().Named("go-redis").Debug(fmt.Sprintf(format, v...))
}

// maxRedisHistory bounds what an operator may ask the server to keep.
const maxRedisHistory = 1000

// Redis is a registry in Redis: a sorted set whose members are the records, or a
// key for each node. Placeholders such as {env.X} and {file.…} are expanded in
// every text.
type Redis struct {
	// The URLs: redis:// or rediss:// for one server, redis+sentinel:// for
	// Sentinels, redis+cluster:// for servers of a Cluster. The path is the
	// number of the database. Default: redis://127.0.0.1:6379
	URLs []string `json:"urls,omitempty"`

	// How to find the server: "single", "sentinel" or "cluster". Default: by the
	// scheme of the URLs
	Mode string `json:"mode,omitempty"`

	// The key of the sorted set; with the layout "keys", what stands before the
	// id of each node, with a colon. Default: catga:nodes
	Key string `json:"key,omitempty"`

	// How the records lie there: "sorted_set" or "keys". Default: sorted_set
	Layout string `json:"layout,omitempty"`

	// How often to look for writers that announce no change. Default: 1s
	Poll caddy.Duration `json:"poll,omitempty"`

	// How many changes are kept for each node, about. Default: 10
	History int `json:"history,omitempty"`

	// The user's name. Default: Redis's default user
	Username string `json:"username,omitempty"`

	// The user's password.
	Password string `json:"password,omitempty"`

	// The number of the database. Default: 0
	DB int `json:"db,omitempty"`

	// The name under which the Sentinels know the master. Default: mymaster
	SentinelMaster string `json:"sentinel_master,omitempty"`

	// The user's name at the Sentinels.
	SentinelUsername string `json:"sentinel_username,omitempty"`

	// The user's password at the Sentinels.
	SentinelPassword string `json:"sentinel_password,omitempty"`

	// Whether the Sentinels speak TLS, where they differ from the servers in that.
	// If it is given the scheme of the URLs says what the servers speak:
	// rediss+sentinel:// with TLS, redis+sentinel:// without. Default: as the servers
	SentinelTLS *bool `json:"sentinel_tls,omitempty"`

	TLSClient
	Options

	resolved redis.Config
}

// CaddyModule returns the Caddy module information.
func (Redis) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "discovery.registries.redis",
		New: func() caddy.Module { return new(Redis) },
	}
}

// Provision expands placeholders and completes the options, so that two
// spellings of one registry become equal.
func (r *Redis) Provision(ctx caddy.Context) error {
	if err := cmp.Or(
		r.Options.Provision(ctx),
		r.TLSClient.provision(),
		replaceURLs(r.URLs),
		ReplaceGlobals(&r.Key, &r.Username, &r.Password, &r.SentinelMaster, &r.SentinelUsername, &r.SentinelPassword),
		caddyblock.CheckDuration("poll", r.Poll),
	); err != nil {
		return err
	}
	sentinelTLS := ""
	if r.SentinelTLS != nil {
		sentinelTLS = map[bool]string{true: redis.TLSOn, false: redis.TLSOff}[*r.SentinelTLS]
	}
	resolved, err := redis.Config{
		URLs:             r.URLs,
		Mode:             r.Mode,
		Key:              r.Key,
		Layout:           r.Layout,
		Poll:             time.Duration(r.Poll),
		History:          r.History,
		Username:         r.Username,
		Password:         r.Password,
		DB:               r.DB,
		SentinelMaster:   r.SentinelMaster,
		SentinelUsername: r.SentinelUsername,
		SentinelPassword: r.SentinelPassword,
		SentinelTLS:      sentinelTLS,
		TLSCA:            r.TLSCA,
		TLSCert:          r.TLSCertificate,
		TLSKey:           r.TLSKey,
		TLSServerName:    r.TLSServerName,
	}.Resolve()
	if err != nil {
		return err
	}
	r.URLs, r.Mode, r.Key, r.Layout = resolved.URLs, resolved.Mode, resolved.Key, resolved.Layout
	r.Poll, r.History = caddy.Duration(resolved.Poll), resolved.History
	r.Username, r.Password, r.DB = resolved.Username, resolved.Password, resolved.DB
	r.SentinelMaster = resolved.SentinelMaster
	if resolved.SentinelTLS == "" {
		r.SentinelTLS = nil // as the servers, which is another spelling
	}
	r.resolved = resolved
	return nil
}

// UnmarshalCaddyfile sets up the backend from Caddyfile tokens. Syntax:
//
//	registry redis [<url>...] {
//	    mode              single|sentinel|cluster
//	    key               <key>
//	    layout            sorted_set|keys
//	    poll              <duration>
//	    history           <n>
//	    username          <name>
//	    password          <password>
//	    db                <n>
//	    sentinel_master   <name>
//	    sentinel_username <name>
//	    sentinel_password <password>
//	    sentinel_tls      on|off
//	    tls_ca            <file>
//	    tls_client_auth   <certificate> <key>
//	    tls_server_name   <name>
//	    ttl               <duration>
//	    loss_guard        <percent>|off
//	    warm_start        on|off
//	}
func (r *Redis) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	return unmarshalBlock(d, r, &r.URLs, caddyblock.Options{
		"mode":              caddyblock.OneOf(&r.Mode, redis.ModeSingle, redis.ModeSentinel, redis.ModeCluster),
		"key":               caddyblock.Text("<key>", &r.Key),
		"layout":            caddyblock.OneOf(&r.Layout, redis.LayoutSortedSet, redis.LayoutKeys),
		"poll":              caddyblock.Duration(&r.Poll),
		"history":           caddyblock.Number(&r.History, 1, maxRedisHistory),
		"username":          caddyblock.Text("<name>", &r.Username),
		"password":          caddyblock.Text("<password>", &r.Password),
		"db":                caddyblock.Number(&r.DB, 0, math.MaxInt32),
		"sentinel_master":   caddyblock.Text("<name>", &r.SentinelMaster),
		"sentinel_username": caddyblock.Text("<name>", &r.SentinelUsername),
		"sentinel_password": caddyblock.Text("<password>", &r.SentinelPassword),
		"sentinel_tls":      caddyblock.OptionalSwitch(&r.SentinelTLS),
	}, r.TLSClient.grammar(), r.Options.grammar())
}

// Open returns the registry, without connecting to it.
func (r *Redis) Open(*slog.Logger) (discovery.Registry, error) { return redis.Open(r.resolved) }

// HasLogin reports whether the server is told who connects.
func (r *Redis) HasLogin() bool {
	return r.Username != "" || r.Password != "" || r.TLSCertificate != "" || hasUser(r.URLs)
}

// Addresses returns the servers' host:port.
func (r *Redis) Addresses() []string { return r.resolved.Addresses() }

// Interface guards
var (
	_ caddy.Provisioner     = (*Redis)(nil)
	_ Backend               = (*Redis)(nil)
	_ caddyfile.Unmarshaler = (*Redis)(nil)
)
