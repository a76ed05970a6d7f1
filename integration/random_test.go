package integration

import (
	"flag"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
	"github.com/caddy-discovery/caddy-discovery/discovery/redis"
	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

var (
	soakFor  = flag.Duration("for", 100*time.Second, "how long TestRandomRun acts")
	soakSeed = flag.Uint64("seed", 0, "what TestRandomRun does, in which order; 0 draws one")
)

const (
	// randomLease is that of the nodes of the random run: some outages, pauses and
	// silences are shorter and some are longer.
	randomLease = 3 * time.Second
	fleetSize   = 50
	// So many nodes are up, heard and not draining at any time.
	fewest, most = 30, 60
	// So many actions come between two rests.
	stint = 50
)

// randomRegistries are the kinds of registry of the random run, each with a registry as the
// program of a node opens it.
var randomRegistries = []struct {
	name  string
	start func(t *testing.T) (crowd, discovery.Registry, error)
}{
	{"nats_kv", func(t *testing.T) (crowd, discovery.Registry, error) {
		p := startKV(t, keeping(2*randomLease))
		r, err := natskv.Open(natskv.Config{
			URLs: []string{p.server.URL()}, Conn: natsconn.Options{User: fleetUser, Password: secret}, NoCreate: true,
		})
		return p, r, err
	}},
	{"redis_sorted_set", func(t *testing.T) (crowd, discovery.Registry, error) {
		p := setKind.start(t).(*faultyRedis)
		r, err := redis.Open(redis.Config{URLs: []string{p.server.URL()}})
		return p, r, err
	}},
	{"redis_keys", func(t *testing.T) (crowd, discovery.Registry, error) {
		p := keysKind.start(t).(*faultyRedis)
		p.keep = randomLease
		r, err := redis.Open(redis.Config{URLs: []string{p.server.URL()}, Layout: redis.LayoutKeys})
		return p, r, err
	}},
}

// A crowd is a registry that tells how its nodes stand.
type crowd interface {
	faultyServer
	live(lease time.Duration) (map[string]string, error)
}

// TestRandomRun does one thing after another to a fleet, its registry and the
// Caddy in front of them, under a load of which every response is checked, and
// comes to rest again and again: then Caddy's view is what the registry lists and
// what the fleet is, those and only those who are up answer, and Caddy holds no
// more than before.
//
// What happens, to whom and in which order follows from the seed; what it meets
// is up to the clock.
func TestRandomRun(t *testing.T) {
	t.Parallel()
	seed := *soakSeed
	for seed == 0 {
		seed = rand.Uint64()
	}
	fmt.Printf("the seed of this random run: -seed %d\n", seed)
	for _, c := range randomRegistries {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			t.Logf("again: go test -race -run '^TestRandomRun$/^%s$' ./integration -args -seed %d -for %v", c.name, seed, *soakFor)
			faultyRegistry, registry, err := c.start(t)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = registry.Close() })
			name := fnv.New64a()
			_, _ = name.Write([]byte(c.name))
			newRandomRun(t, faultyRegistry, registry, rand.New(rand.NewPCG(seed, name.Sum64()))).run()
		})
	}
}

type randomRun struct {
	*testRig
	crowd    crowd
	registry discovery.Registry // in which members of ours announce themselves
	rand     *rand.Rand         // the only source of what happens
	others   [2]string          // ports of further sites
	shape    shape
	network  int // the fleet has addresses of its own, on which nobody else listens
	started  int // processes

	members []*member // the fleet: they heartbeat, and serve unless their state says otherwise
	wrong   *member   // of another service
	silent  []*silence
	gone    []*member // they left, or lapsed for good, and still answer whoever asks
	past    []*member // they do not

	trouble *trouble
	load    *load
	done    map[string]int
	rests   []time.Duration
	served  int
	closed  int
}

// A silence is a member that serves on and is not heard for some actions.
type silence struct {
	*member
	left int
}

// A trouble is something that is wrong with the registry for some actions.
type trouble struct {
	name string
	end  func()
	left int
}

func newRandomRun(t *testing.T, c crowd, registry discovery.Registry, rng *rand.Rand) *randomRun {
	r := &randomRun{
		testRig: &testRig{t: t, faultyRegistry: c, link: newLink(t, c.addresses()[0]), port: freeport.String(t)},
		crowd:   c, registry: registry, rand: rng,
		others:  [2]string{freeport.String(t), freeport.String(t)},
		network: 2 + rand.IntN(250),
		done:    make(map[string]int),
	}
	t.Cleanup(c.resume)
	for i := range fleetSize {
		r.join(fmt.Sprintf("orders-%d", i))
	}
	r.wrong = r.enlist("pay-1", "pay", true)
	r.proxy = start(t, r.options(), r.sites())
	t.Cleanup(func() {
		// All at once: each waits for its drain.
		for _, m := range slices.Concat(r.members, r.gone, []*member{r.wrong}) {
			m.line.mute.Store(true)
			m.leave()
		}
	})
	return r
}

func (r *randomRun) enlist(id, kind string, ours bool) *member {
	r.t.Helper()
	r.started++
	host := fmt.Sprintf("127.%d.%d.%d", r.network, 1+r.started/250, 1+r.started%250)
	var a discovery.Announcer = r.registry
	if !ours {
		a = wildWriter{r.faultyRegistry}
	}
	return enlist(r.t, a, id, kind, newServiceAt(r.t, fmt.Sprintf("%s#%d", id, r.started), host), randomLease)
}

// join starts a process of the fleet, of ours or one as they are in the wild.
func (r *randomRun) join(id string) *member {
	m := r.enlist(id, "orders", r.rand.IntN(2) == 0)
	r.members = append(r.members, m)
	return m
}

func (r *randomRun) newcomer() *member { return r.join(fmt.Sprintf("orders-%d", r.started)) }

// serving returns the members that are up.
func (r *randomRun) serving() []*member {
	return slices.DeleteFunc(slices.Clone(r.members), func(m *member) bool { return m.state != discovery.StateUp })
}

// take removes one of those who serve from the fleet; nil if they are too few.
func (r *randomRun) take() *member {
	serving := r.serving()
	if len(serving) <= fewest {
		return nil
	}
	m := serving[r.rand.IntN(len(serving))]
	r.members = slices.DeleteFunc(r.members, func(other *member) bool { return other == m })
	return m
}

// A shape is what differs between the configurations that are loaded. The zero
// value is the one at rest.
type shape struct {
	policy int  // one of policies
	health bool // active checks
	alone  bool // without a registrar
	extra  bool // another source of the same registry
	second bool // another directory of it, with a connection of its own
}

var policies = []struct{ source, policy string }{
	{"", "lb_policy round_robin"},
	{"", "lb_policy least_conn"},
	{"", "lb_policy random"},
	{"pick 2", "lb_policy least_conn"},
	{"pick 2\nslow_start 5s", "lb_policy least_load"},
	{"pick 3 hash {http.request.remote.port}", "lb_policy first"},
	{"subset 25\nproxy_id edge-1", "lb_policy round_robin"},
}

func (r *randomRun) options() string {
	if r.shape.alone {
		return ""
	}
	return fmt.Sprintf("registrar {\n%s\nnode_id edge-1\nendpoint http://127.0.0.1:%s\nheartbeat %v\nttl %v\ndrain 500ms\nmetadata service edge\n}",
		r.block(r.link.address()), r.port, randomLease/3, randomLease)
}

func (r *randomRun) sites() string {
	block := r.block(r.link.address())
	policy := policies[r.shape.policy]
	source := block + "\nservice orders\n" + policy.source
	if r.shape.health {
		source += "\nhealth {\nuri /\ninterval 2s\n}"
	}
	sites := site(r.port, source, policy.policy+"\nlb_retries 5\nfail_duration 10s")
	if r.shape.extra {
		sites += site(r.others[0], block+"\nservice {header.X-Service}\nprefer zone x\npick 2", "")
	}
	if r.shape.second {
		sites += site(r.others[1], with(block, "ttl 1h")+"\nservice orders", "")
	}
	return sites
}

// with adds an option to a block that names a registry.
func with(block, option string) string {
	if head, ok := strings.CutSuffix(block, "}"); ok {
		return head + option + "\n}"
	}
	return block + " {\n" + option + "\n}"
}

func (r *randomRun) say(format string, args ...any) {
	r.t.Helper()
	r.t.Logf(time.Now().Format("15:04:05.000 ")+format, args...)
}

// An action is something that happens. It returns whom it happened to, or what
// else there is to know.
type action struct {
	name   string
	weight int
	do     func(r *randomRun) string
}

var actions = []action{
	{"join", 12, func(r *randomRun) string { return r.newcomer().id }},
	{"many join", 2, func(r *randomRun) string {
		n := 3 + r.rand.IntN(6)
		for range n {
			r.newcomer()
		}
		return fmt.Sprint(n)
	}},
	{"leave", 9, func(r *randomRun) string {
		m := r.take()
		if m == nil {
			return ""
		}
		r.goodbye(m, r.rand.IntN(3) == 0)
		return m.service.id
	}},
	{"crash", 10, func(r *randomRun) string {
		m := r.take()
		if m == nil {
			return ""
		}
		m.crash()
		r.past = append(r.past, m)
		return m.service.id
	}},
	{"restart elsewhere", 7, func(r *randomRun) string {
		m := r.take()
		if m == nil {
			return ""
		}
		m.crash()
		r.past = append(r.past, m)
		return m.service.id + " → " + r.join(m.id).service.id
	}},
	// As a container is: the new process is there before the old one says goodbye.
	{"replace", 4, func(r *randomRun) string {
		m := r.take()
		if m == nil {
			return ""
		}
		if _, wild := m.line.announcer.(wildWriter); wild {
			r.members = append(r.members, m) // such a writer removes whatever stands there
			return ""
		}
		next := r.enlist(m.id, "orders", true)
		r.members = append(r.members, next)
		r.goodbye(m, false)
		return m.service.id + " → " + next.service.id
	}},
	{"state", 6, func(r *randomRun) string {
		m := r.members[r.rand.IntN(len(r.members))]
		state := []discovery.State{discovery.StateDraining, discovery.StateMaintenance}[r.rand.IntN(2)]
		if m.state != discovery.StateUp || len(r.serving()) <= fewest {
			state = discovery.StateUp
		}
		m.state = state
		if err := m.registrar.Update(m.node(r.t, "orders"), m.options(randomLease)); err != nil {
			r.t.Fatal(err)
		}
		return m.service.id + " " + string(state)
	}},
	{"silence", 4, func(r *randomRun) string {
		actions := 1 + r.rand.IntN(16)
		m := r.take()
		if m == nil {
			return ""
		}
		m.line.mute.Store(true)
		r.silent = append(r.silent, &silence{m, actions})
		return fmt.Sprint(m.service.id, " for ", actions)
	}},
	{"reload", 3, func(r *randomRun) string {
		r.reload()
		return ""
	}},
	{"reload another configuration", 10, func(r *randomRun) string {
		r.shape = shape{r.rand.IntN(len(policies)), r.rand.IntN(3) == 0, r.rand.IntN(4) == 0, r.rand.IntN(2) == 0, r.rand.IntN(3) == 0}
		r.reload()
		return fmt.Sprintf("%+v", r.shape)
	}},
	{"registry killed", 3, func(r *randomRun) string {
		return r.fail("registry killed", func() { r.crowd.kill() }, func() { r.crowd.restart() })
	}},
	{"registry paused", 4, func(r *randomRun) string {
		return r.fail("registry paused", func() { r.crowd.pause() }, func() { r.crowd.resume() })
	}},
	{"link silent", 3, func(r *randomRun) string {
		return r.fail("link silent", func() { r.link.drop(true) }, func() { r.link.drop(false) })
	}},
	{"link down", 3, func(r *randomRun) string {
		return r.fail("link down", func() { r.link.refuse(true) }, func() { r.link.refuse(false) })
	}},
	{"link slow", 3, func(r *randomRun) string {
		return r.fail("link slow", func() { r.link.slow(300 * time.Millisecond) }, func() { r.link.slow(0) })
	}},
	{"link cut", 4, func(r *randomRun) string {
		r.link.cut()
		return ""
	}},
	{"registry wiped", 1, func(r *randomRun) string {
		if r.trouble != nil {
			return ""
		}
		eventually(r.t, "the registry can be wiped", func() bool { return r.crowd.wipe() == nil })
		return ""
	}},
}

// goodbye makes a member leave; its process ends with that, or later.
func (r *randomRun) goodbye(m *member, stays bool) {
	m.leave()
	if stays {
		r.gone = append(r.gone, m)
		return
	}
	r.past = append(r.past, m)
	go func() {
		<-m.ended
		m.service.close()
	}()
}

func (r *randomRun) reload() { r.proxy.reload(r.options(), r.sites()) }

// fail begins a trouble that lasts for some actions; where there is one already,
// that one ends.
func (r *randomRun) fail(name string, begin, end func()) string {
	actions := 1 + r.rand.IntN(16)
	if r.trouble != nil {
		r.mend()
		return ""
	}
	begin()
	r.trouble = &trouble{name, end, actions}
	return fmt.Sprint("for ", actions)
}

func (r *randomRun) mend() {
	if r.trouble != nil {
		r.trouble.end()
		r.say("over: %s", r.trouble.name)
		r.trouble = nil
	}
}

// step does something.
func (r *randomRun) step() {
	sum := 0
	for _, a := range actions {
		sum += a.weight
	}
	draw := r.rand.IntN(sum)
	for _, a := range actions {
		if draw -= a.weight; draw >= 0 {
			continue
		}
		if len(r.serving()) > most {
			a = actions[2] // leave
		}
		r.say("%s %s", a.name, a.do(r))
		r.done[a.name]++
		break
	}
	if r.trouble != nil {
		if r.trouble.left--; r.trouble.left == 0 {
			r.mend()
		}
	}
	r.silent = slices.DeleteFunc(r.silent, func(s *silence) bool {
		if s.left--; s.left > 0 {
			return false
		}
		r.say("heard again: %s", s.service.id)
		s.line.mute.Store(false)
		r.members = append(r.members, s.member)
		return true
	})
	<-time.After(time.Duration(50+r.rand.IntN(850)) * time.Millisecond)
	if r.load.failed() > 0 {
		r.load.stop(r.t)
		r.t.FailNow()
	}
}

func (r *randomRun) run() {
	t := r.t
	eventually(t, "Caddy knows the fleet", func() bool { return len(r.view()) == fleetSize+2 })
	r.begin()
	before := r.rest(nil)
	t.Logf("at first: %v", before)
	now := before
	for began := time.Now(); time.Since(began) < *soakFor; {
		for range stint {
			if time.Since(began) >= *soakFor {
				break
			}
			r.step()
		}
		now = r.rest(&before)
	}
	slices.Sort(r.rests)
	t.Logf("at last: %v", now)
	t.Logf("%d processes, %d requests served, none failed, %d connections closed by reloads; %d rests, of which the view was right after %v at most",
		r.started, r.served, r.closed, len(r.rests), r.rests[len(r.rests)-1].Round(time.Millisecond))
	for _, name := range slices.Sorted(maps.Keys(r.done)) {
		t.Logf("%5d %s", r.done[name], name)
	}
}

func (r *randomRun) begin() {
	r.load = steady(r.t, "http://127.0.0.1:"+r.port, 20*time.Millisecond)
}

// rest ends whatever is wrong, and waits until all is as it should be: right, and
// no more than before.
func (r *randomRun) rest(before *resources) resources {
	t := r.t
	r.say("rest")
	r.mend()
	r.shape = shape{}
	r.reload()
	over := time.Now()
	// What was said late is said by now.
	for _, m := range r.past {
		<-m.ended
	}
	for _, m := range r.gone {
		<-m.ended
	}
	eventually(t, "nothing is under way to the registry", func() bool {
		return !slices.ContainsFunc(r.silent, func(s *silence) bool { return s.line.busy.Load() > 0 })
	})
	beats := make(map[*member]int64)
	for _, m := range r.members {
		beats[m] = m.beats.Load()
	}
	for _, m := range r.members {
		eventually(t, m.service.id+" goes on announcing itself", func() bool { return m.beats.Load() > beats[m] })
	}

	want := map[string]string{
		"edge-1":   "http://127.0.0.1:" + r.port + " up",
		r.wrong.id: standing(r.wrong.node(t, "pay")),
	}
	for _, m := range r.members {
		want[m.id] = standing(m.node(t, "orders"))
	}
	var listed, viewed map[string]string
	func() {
		defer func() {
			if t.Failed() {
				t.Logf("the fleet and the registry: %s\nthe fleet and Caddy: %s", difference(want, listed), difference(want, viewed))
			}
		}()
		told := time.Now()
		// A machine that keeps a heartbeat from coming in time makes them differ again.
		within(t, 4*patience, "Caddy's view, the registry and the fleet are one", func() bool {
			var err error
			if time.Since(told) > patience/6 {
				told = time.Now()
				r.say("the fleet and the registry: %s\nthe fleet and Caddy: %s", difference(want, listed), difference(want, viewed))
			}
			if listed, err = r.crowd.live(randomLease); err != nil {
				return false
			}
			viewed = r.view()
			return maps.Equal(listed, want) && maps.Equal(viewed, want)
		})
	}()
	settled := time.Since(over)
	r.rests = append(r.rests, settled)

	r.load.mark()
	serving := make(map[string]bool)
	for _, m := range r.serving() {
		serving[m.service.id] = true
	}
	eventually(t, "each node that is up answers", func() bool {
		answers := r.load.sinceMark()
		for id := range serving {
			if answers[id] == 0 {
				return false
			}
		}
		return true
	})
	answers := r.load.sinceMark()
	for _, id := range slices.Sorted(maps.Keys(answers)) {
		if !serving[id] {
			t.Errorf("%s answered %d requests after it had left, lapsed or been drained", id, answers[id])
		}
	}
	r.load.stop(t)
	r.served += r.load.served()
	r.closed += r.load.closed
	if n := r.load.answers[r.wrong.service.id]; n > 0 {
		t.Errorf("%d requests were answered by another service", n)
	}
	if t.Failed() {
		t.FailNow()
	}

	// A new transport has no connections to nodes, and those of the old one end.
	r.reload()
	var now resources
	if before == nil {
		now = r.resourcesAtRest()
	} else {
		now = r.resourcesReleased(*before)
	}
	for _, m := range r.gone {
		m.service.close()
	}
	r.gone, r.past = nil, nil
	r.say("rested: the view was right after %v; %d members, %v", settled.Round(time.Millisecond), len(r.members), now)
	r.begin()
	return now
}

// difference says in what two sets of nodes differ.
func difference(want, got map[string]string) string {
	var lines []string
	for id, standing := range want {
		if got[id] != standing {
			lines = append(lines, fmt.Sprintf("%s: want %q, got %q", id, standing, got[id]))
		}
	}
	for id, standing := range got {
		if want[id] == "" {
			lines = append(lines, fmt.Sprintf("%s: want nothing, got %q", id, standing))
		}
	}
	slices.Sort(lines)
	return fmt.Sprint(len(lines), " differences\n", strings.Join(lines, "\n"))
}
