package caddydiscovery

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-discovery/caddy-discovery/backend"
	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

// Discovered matches requests for whose host and path there is a node: one that announces
// the host in its metadata "hosts" and, where it names "paths", one that fits. Whether it
// can serve now does not matter, so that a service all of whose nodes drain is answered
// with 503 by the proxy behind the matcher, and not like one that nobody knows.
//
// Paths are compared like those of Caddy's own matcher, without regard to case, and as the
// request has them after the rewrites before. While the registry has never been listed,
// and no saved list has such a node, the request ends with 503.
type Discovered struct {
	// The registry whose nodes announce hosts.
	RegistryRaw json.RawMessage `json:"registry,omitempty" caddy:"namespace=discovery.registries inline_key=backend"`

	// How long requests wait for the first listing of the registry, counted from
	// when the directory was opened. Default: 2s
	SyncTimeout caddy.Duration `json:"sync_timeout,omitempty"`

	directory *sharedDirectory
	hosts     *hostUser
	cold      coldStart
	starting  sync.Once
}

// CaddyModule returns the Caddy module information.
func (*Discovered) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{
		ID:  "http.matchers.discovered",
		New: func() caddy.Module { return new(Discovered) },
	}
}

// Provision opens the directory. It needs no registry to be there.
func (m *Discovered) Provision(ctx caddy.Context) error {
	if err := caddyblock.CheckDuration("sync_timeout", m.SyncTimeout); err != nil {
		return err
	}
	m.SyncTimeout = cmp.Or(m.SyncTimeout, defaultSyncTimeout)
	if err := exposeMetrics(ctx); err != nil {
		return err
	}
	b, err := backend.Load(ctx, m, "RegistryRaw", m.RegistryRaw)
	if err != nil {
		return err
	}
	if m.directory, err = acquireDirectory(b); err != nil {
		return fmt.Errorf("opening the registry: %w", err)
	}
	m.cold.directory, m.cold.timeout = m.directory.Directory, time.Duration(m.SyncTimeout)
	if m.hosts, err = newHostUser(ctx, m.directory); err != nil {
		return err
	}
	return onEvent(ctx, "started", m.start)
}

// start begins to follow the registry. Requests call it, too: servers accept them before
// Caddy says "started".
func (m *Discovered) start() {
	m.starting.Do(func() {
		m.hosts.join()
		m.directory.start()
		m.cold.begin(time.Unix(0, m.directory.opened.Load()))
	})
}

// errNotListed is the error of requests for which there may be a node that is not known
// yet.
var errNotListed = caddyhttp.Error(http.StatusServiceUnavailable, errors.New("the registry could not be listed yet, and it is not known whether a node announces the host"))

// MatchWithError reports whether a node announces the request's host and path.
func (m *Discovered) MatchWithError(r *http.Request) (bool, error) {
	m.start()
	matches := func(s *discovery.Snapshot) bool {
		_, route := routeOf(s, r)
		return route != nil
	}
	s := m.directory.Snapshot()
	if !s.Synced || !m.hosts.seen(s) {
		s = m.hosts.await(r.Context(), m.cold.awaitListing(r.Context(), matches))
	}
	if matches(s) {
		return true, nil
	}
	if !s.Synced || !m.hosts.seen(s) {
		return false, errNotListed
	}
	return false, nil
}

// Match is MatchWithError for callers that know of no errors.
func (m *Discovered) Match(r *http.Request) bool {
	match, err := m.MatchWithError(r)
	return match && err == nil
}

// Cleanup releases the directory, which ends if nobody else uses it.
func (m *Discovered) Cleanup() error {
	m.starting.Do(func() {}) // from here on nothing is started
	m.cold.end()
	m.hosts.leave()
	if m.directory == nil {
		return nil
	}
	return m.directory.release()
}

// UnmarshalCaddyfile sets up the matcher from Caddyfile tokens. Syntax:
//
//	discovered [<registry>] {
//	    registry     <backend> [<url>...] {
//	        <backend options>
//	    }
//	    sync_timeout <duration>
//	}
//
// The registry is its name or its URLs; where exactly one is declared, it may be left out.
func (m *Discovered) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	if err := unmarshalBlock(d, "discovered", &m.RegistryRaw, caddyblock.Options{
		"sync_timeout": caddyblock.Duration(&m.SyncTimeout),
	}, nil); err != nil {
		return err
	}
	if d.Next() {
		return d.Err("discovered is given twice in one matcher; want it once, or two matchers")
	}
	return nil
}

// CELLibrary has expressions ask the matcher:
//
//	expression discovered() && path('/api/*')
//	expression discovered('main')
//
// The argument is the name of a registry that the global option discovery declares.
func (*Discovered) CELLibrary(ctx caddy.Context) (cel.Library, error) {
	const function = "discovered_match_request_string"
	factory := func(data ref.Val) (caddyhttp.RequestMatcherWithError, error) {
		m := new(Discovered)
		if name, ok := data.Value().(string); ok && name != "" {
			m.RegistryRaw = caddyconfig.JSONModuleObject(backend.Named{Name: name}, "backend", "named", nil)
		}
		// As a module of its own Caddy cleans it up.
		module, err := ctx.LoadModuleByID(string(m.CaddyModule().ID), caddyconfig.JSON(m, nil))
		if err != nil {
			return nil, err
		}
		return module.(*Discovered), nil
	}
	call := func(eh cel.MacroExprFactory, _ ast.Expr, args []ast.Expr) (ast.Expr, *common.Error) {
		name := eh.NewLiteral(types.String(""))
		if len(args) > 0 {
			// A placeholder would open the registry anew for each request.
			if name = args[0]; name.Kind() != ast.LiteralKind || name.AsLiteral().Type() != types.StringType {
				return nil, eh.NewError(name.ID(), "discovered wants the name of a registry as a literal, such as discovered('main'), or nothing")
			}
		}
		return eh.NewCall(function, eh.NewIdent(caddyhttp.CELRequestVarName), name), nil
	}
	return caddyhttp.NewMatcherCELLibrary(
		[]cel.EnvOption{
			cel.Macros(cel.GlobalMacro("discovered", 0, call), cel.GlobalMacro("discovered", 1, call)),
			cel.Function(function,
				cel.Overload(function, []*cel.Type{cel.ObjectType("http.Request"), cel.StringType}, cel.BoolType),
				cel.SingletonBinaryBinding(caddyhttp.CELMatcherRuntimeFunction(function, factory))),
		},
		[]cel.ProgramOption{cel.CustomDecorator(caddyhttp.CELMatcherDecorator(function, factory))},
	), nil
}

// Interface guards
var (
	_ caddy.Provisioner                 = (*Discovered)(nil)
	_ caddy.CleanerUpper                = (*Discovered)(nil)
	_ caddyfile.Unmarshaler             = (*Discovered)(nil)
	_ caddyhttp.RequestMatcherWithError = (*Discovered)(nil)
	_ caddyhttp.CELLibraryProducer      = (*Discovered)(nil)
)
