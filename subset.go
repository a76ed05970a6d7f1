package caddydiscovery

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/picker"
)

// A subset is what a source with that option knows of the proxies with which it shares
// the nodes: those that say so in their own records in the source's registry. It needs
// the registrar of its config to say so as well.
type subset struct {
	group     *picker.Group
	directory *sharedDirectory
	config    *caddyevents.App // which there is one of in each config
	log       *zap.Logger
	begun     time.Time
	watching  background

	mu    sync.Mutex // guards what follows; nothing else happens under it
	told  picker.Sharing
	lines *rate.Limiter
}

const (
	// subsetGrace is for how long a proxy that has just started expects others, which may
	// be starting as well.
	subsetGrace = 10 * time.Second
	// Proxies that come and go as fast as they can write a line in so long a time.
	subsetLines = 10 * time.Second
)

// subsets are those of all configs that are there.
var subsets struct {
	sync.Mutex
	of map[*caddyevents.App][]*subset
}

// newSubset returns the subset of a source, by what it asks for. It is matched by one of
// release.
func newSubset(ctx caddy.Context, group *picker.Group, d *sharedDirectory, log *zap.Logger) (*subset, error) {
	app, err := ctx.App("events")
	if err != nil {
		return nil, fmt.Errorf("getting the events app: %w", err)
	}
	s := &subset{
		group: group, directory: d, config: app.(*caddyevents.App), log: log, begun: time.Now(),
		lines: newSubsetLimiter(),
	}
	subsets.Lock()
	defer subsets.Unlock()
	if subsets.of == nil {
		subsets.of = make(map[*caddyevents.App][]*subset)
	}
	subsets.of[s.config] = append(subsets.of[s.config], s)
	return s, nil
}

func newSubsetLimiter() *rate.Limiter { return rate.NewLimiter(rate.Every(subsetLines), 5) }

func (s *subset) release() {
	s.watching.end()
	subsets.Lock()
	defer subsets.Unlock()
	if left := slices.DeleteFunc(subsets.of[s.config], func(other *subset) bool { return other == s }); len(left) > 0 {
		subsets.of[s.config] = left
	} else {
		delete(subsets.of, s.config)
	}
}

// subsetsOf returns those of a config.
func subsetsOf(config *caddyevents.App) []*subset {
	subsets.Lock()
	defer subsets.Unlock()
	return slices.Clone(subsets.of[config])
}

// listedIn returns which of the registries is that of the source, -1 if none is: the one
// with the same options, or else of the same name. The registrar may lack an option, such
// as how to read records.
func (s *subset) listedIn(registries []*sharedRegistry) int {
	own := s.directory.registry
	if i := slices.Index(registries, own); i >= 0 {
		return i
	}
	return slices.IndexFunc(registries, func(r *sharedRegistry) bool {
		return r.kind == own.kind && r.conn.String() == own.conn.String()
	})
}

// shares reports whether the node is another proxy of the group.
func (s *subset) shares(e *discovery.Entry) bool { return s != nil && s.group.Claims(e) }

// start begins to look whether this proxy stays alone, to say so where that matters.
// Serves reports whether the source uses a node.
func (s *subset) start(want int, serves func(*discovery.Entry) bool) {
	s.watching.start(func(ctx context.Context) { s.expectOthers(ctx, want, serves) })
}

// expectOthers waits for the first listing and, where others can see this proxy, for a
// while for others. If there are none it says what that means for the nodes there are.
func (s *subset) expectOthers(ctx context.Context, want int, serves func(*discovery.Entry) bool) {
	select {
	case <-s.directory.Synced():
	case <-ctx.Done():
		return
	}
	grace := time.NewTimer(time.Until(s.begun.Add(subsetGrace)))
	defer grace.Stop()
	for waiting := s.group.Joined(); waiting; {
		snapshot := s.directory.Snapshot()
		if len(s.group.Proxies(snapshot)) > 1 {
			return
		}
		select {
		case <-snapshot.Superseded():
		case <-grace.C:
			waiting = false
		case <-ctx.Done():
			return
		}
	}
	nodes := 0
	for _, e := range s.directory.Snapshot().Nodes() {
		if serves(e) {
			nodes++
		}
	}
	if nodes > want {
		s.tell(picker.Sharing{Proxies: 1, Nodes: nodes, Wanted: want, Subset: want})
	}
}

// tell logs with how many proxies the nodes are shared, once for each number of them and
// once that the subset is raised with them.
func (s *subset) tell(how picker.Sharing) {
	if how.Proxies == 1 && s.group.Joined() && time.Since(s.begun) < subsetGrace {
		return // others may come yet
	}
	raised := how.Subset > how.Wanted
	s.mu.Lock()
	news := s.told.Proxies != how.Proxies || raised && s.told.Subset <= s.told.Wanted
	if news = news && s.lines.Allow(); news {
		s.told = how
	}
	s.mu.Unlock()
	switch {
	case !news:
	case how.Proxies > 1 && raised:
		s.log.Info("sharing the nodes with the other proxies in the registry; the subset is raised, because so many proxies cannot use all nodes with it",
			zap.Int("proxies", how.Proxies), zap.Int("nodes", how.Nodes), zap.Int("subset", how.Subset), zap.Int("configured", how.Wanted))
	case how.Proxies > 1:
		s.log.Info("sharing the nodes with the other proxies in the registry",
			zap.Int("proxies", how.Proxies), zap.Int("nodes", how.Nodes), zap.Int("subset", how.Subset))
	default:
		why := "no other proxy lists itself in this registry with the same service and a subset"
		if !s.group.Joined() {
			why = "this proxy does not list itself in this registry; want the global option registrar, on each proxy, with the same registry"
		}
		s.log.Warn("the subset is drawn by chance: proxies that draw so, and are just as many as could use every node, leave a part of the nodes idle",
			zap.String("because", why), zap.Int("nodes", how.Nodes), zap.Int("subset", how.Subset),
			zap.String("idle", fmt.Sprintf("%.0f%%", 100*picker.Idle(how.Nodes, how.Subset))))
	}
}

// provisionSubset has the source look for proxies with which it shares the nodes, if it
// uses but a part of them.
func (u *Upstreams) provisionSubset(ctx caddy.Context) (err error) {
	if u.Subset == 0 {
		return nil
	}
	u.builder.Group = picker.NewGroup(u.fleet(), u.ProxyID, u.Subset)
	log := u.logger.With(zap.String("service", u.Service))
	if u.subset, err = newSubset(ctx, u.builder.Group, u.directory, log); err != nil {
		return err
	}
	u.builder.Shared = u.subset.tell
	return nil
}

// fleet names what the source asks for, so that proxies that ask for the same find each
// other: as it is configured, with placeholders of requests unexpanded.
func (u *Upstreams) fleet() string {
	where := make([]string, len(u.Where))
	for i, c := range u.Where {
		where[i] = fmt.Sprintf("%q %q", c.Key, slices.Sorted(slices.Values(c.Values)))
	}
	slices.Sort(where)
	return fmt.Sprintf("%q %s %s %q %t", u.Service, u.builder.Scheme, strings.Join(where, ","), u.Prefer, u.Route)
}

// claimSubsets has the record of each node say which fleets this proxy shares with others,
// for the sources of this config that watch its registry. Where several nodes of this
// Caddy are in one registry the first one says so.
func (app *Registrar) claimSubsets() error {
	registries := make([]*sharedRegistry, 0, len(app.Nodes))
	defer func() {
		for _, r := range registries {
			_ = r.release() // those of nodes are acquired again in a moment
		}
	}()
	for _, n := range app.Nodes {
		r, err := acquireRegistry(n.backend)
		if err != nil {
			return fmt.Errorf("opening the registry: %w", err)
		}
		registries = append(registries, r)
	}
	groups := make([][]*picker.Group, len(app.Nodes))
	for _, s := range subsetsOf(app.config) {
		if i := s.listedIn(registries); i >= 0 {
			groups[i] = append(groups[i], s.group)
		}
	}
	for i, n := range app.Nodes {
		claims, claimed := picker.Claims(groups[i])
		n.claims = claims
		if err := n.checkNode(); err != nil {
			n.claims = ""
			app.log.Warn("the node's record has no room for its subsets, which are drawn by chance therefore", zap.String("node", n.NodeID), zap.Error(err))
			continue
		}
		for _, g := range claimed {
			g.Join()
		}
	}
	return nil
}
