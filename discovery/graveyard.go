package discovery

import (
	"cmp"
	"container/list"
	"slices"
	"time"
)

const (
	// What is kept of nodes that lapsed: so many, of so many bytes, and for so long.
	// The first two are more than the half of the largest fleet, which is how many
	// may lapse one by one before the loss guard asks them all.
	maxGraves     = 1 << 16
	maxGraveBytes = 96 << 20
	graveTime     = MaxLease

	// So often a node is asked again of which a probe could tell nothing.
	maxAgain = 3
)

// A graveyard keeps the records of nodes that lapsed, so that they can be brought
// back: by the loss guard, when so many lapsed that they are asked themselves, or by
// a heartbeat that names no endpoint. Those that lapsed within one lease are counted,
// as the loss guard needs it, in all and by service. It is bounded in number, bytes
// and time, the oldest go first, and each step costs the logarithm of their number.
// Those that are being asked are beside that: they have the bounds of the nodes in use,
// so that as many can be brought back, and none goes before its answer.
type graveyard struct {
	most, mostBytes int

	byID     map[string]*grave
	byRecord map[string]*grave
	ages     *list.List       // *grave, the oldest first, without those that are being asked
	bytes    int              // of those
	pending  int              // how many are being asked
	room     room             // of those
	recent   timeQueue[grave] // those that count, the one first that does so no longer
	plots    map[string]*plot
	unasked  int // of all plots
}

// grave is what is kept of one node.
type grave struct {
	entry    *Entry
	key      string // of its record, where it has one
	revision uint64
	watch    uint64 // the last one that showed it
	saved    bool   // it comes from the saved list

	since time.Duration // when it lapsed
	until time.Duration // up to when it counts as one that lapsed lately
	bytes int
	age   *list.Element // nil while it is being asked
	room  int           // what it takes of the room, while it is being asked
	place int           // in recent
	again int           // how often it was asked in vain
}

func (g *grave) id() string     { return g.entry.Node.ID }
func (g *grave) record() string { return recordName(g.key, g.entry.Node.ID) }

// compare orders graves by when they lapsed.
func (g *grave) compare(o *grave) int {
	return cmp.Or(cmp.Compare(g.since, o.since), cmp.Compare(g.id(), o.id()))
}

// plot is what counts of one service.
type plot struct {
	lapsed  int
	unasked map[*grave]struct{} // not dialled since they lapsed
}

func newGraveyard(most, mostBytes int) graveyard {
	return graveyard{
		most: most, mostBytes: mostBytes,
		byID: make(map[string]*grave), byRecord: make(map[string]*grave),
		ages: list.New(), plots: make(map[string]*plot),
		recent: timeQueue[grave]{
			time:  func(g *grave) time.Duration { return g.until },
			place: func(g *grave) *int { return &g.place },
		},
	}
}

// bury keeps a node that lapsed at a time, in place of what was kept of it. It
// counts as one that lapsed lately up to its until, not at all if that is no later; and
// it need not be dialled if it was asked already.
func (y *graveyard) bury(g *grave, at time.Duration, asked bool) {
	y.add(g, at, asked)
	y.trim()
}

// buryAsked is bury for a node that is to be dialled now. It reports whether there is
// room to wait for its answer.
func (y *graveyard) buryAsked(g *grave, at time.Duration) bool {
	y.add(g, at, true)
	pending := y.await(g)
	y.trim()
	return pending
}

// add is bury without its bounds.
func (y *graveyard) add(g *grave, at time.Duration, asked bool) {
	for _, old := range []*grave{y.byID[g.id()], y.byRecord[g.record()]} {
		if old != nil {
			y.drop(old)
		}
	}
	g.since = at
	g.bytes = g.entry.Node.footprint() + len(g.key)
	g.age = y.ages.PushBack(g)
	y.byID[g.id()], y.byRecord[g.record()] = g, g
	y.bytes += g.bytes
	if g.until > at {
		y.recent.put(g)
		p := y.plots[g.entry.Node.Service()]
		if p == nil {
			p = &plot{unasked: make(map[*grave]struct{})}
			y.plots[g.entry.Node.Service()] = p
		}
		p.lapsed++
		if !asked {
			p.unasked[g] = struct{}{}
			y.unasked++
		}
	}
}

// trim drops the oldest that are too many.
func (y *graveyard) trim() {
	for y.ages.Len() > y.most || y.bytes > y.mostBytes {
		y.drop(y.ages.Front().Value.(*grave))
	}
}

// await keeps a node until [graveyard.answered], whatever lapses meanwhile, and
// reports whether there is room for it.
func (y *graveyard) await(g *grave) bool {
	if g.age == nil || y.pending >= MaxNodes || y.room.refuses(0, &g.entry.Node) != nil {
		return false
	}
	y.ages.Remove(g.age)
	g.age = nil
	y.bytes -= g.bytes
	y.pending++
	g.room = y.room.take(0, &g.entry.Node)
	return true
}

// answered ends await at a time.
func (y *graveyard) answered(g *grave, at time.Duration) {
	if y.byID[g.id()] != g || g.age != nil {
		return
	}
	y.leave(g)
	g.since = at
	g.age = y.ages.PushBack(g)
	y.bytes += g.bytes
	y.trim()
}

// leave takes a node out of those that are being asked.
func (y *graveyard) leave(g *grave) {
	y.pending--
	g.room = y.room.take(g.room, nil)
}

// drop forgets a node, if it is there.
func (y *graveyard) drop(g *grave) {
	if y.byID[g.id()] != g {
		return
	}
	delete(y.byID, g.id())
	delete(y.byRecord, g.record())
	if g.age == nil {
		y.leave(g)
	} else {
		y.ages.Remove(g.age)
		y.bytes -= g.bytes
	}
	y.discount(g)
}

// discount has a node count no longer.
func (y *graveyard) discount(g *grave) {
	if !y.recent.has(g) {
		return
	}
	y.recent.remove(g)
	service := g.entry.Node.Service()
	p := y.plots[service]
	if _, is := p.unasked[g]; is {
		delete(p.unasked, g)
		y.unasked--
	}
	if p.lapsed--; p.lapsed == 0 {
		delete(y.plots, service)
	}
}

// expire brings the graveyard up to a time.
func (y *graveyard) expire(at time.Duration) {
	for g := y.recent.firstBy(at); g != nil; g = y.recent.firstBy(at) {
		y.discount(g)
	}
	for e := y.ages.Front(); e != nil && e.Value.(*grave).since+graveTime <= at; e = y.ages.Front() {
		y.drop(e.Value.(*grave))
	}
}

// lapsed returns how many nodes lapsed lately.
func (y *graveyard) lapsed() int { return len(y.recent.items) }

// lapsedOf returns how many nodes of a service lapsed lately.
func (y *graveyard) lapsedOf(service string) int {
	if p := y.plots[service]; p != nil {
		return p.lapsed
	}
	return 0
}

// ask returns the nodes that lapsed lately and were not asked since, each once.
func (y *graveyard) ask() (asked []*grave) {
	if y.unasked == 0 {
		return nil
	}
	for service := range y.plots {
		asked = append(asked, y.askOf(service)...)
	}
	slices.SortFunc(asked, (*grave).compare)
	return asked
}

// askOf is ask for one service.
func (y *graveyard) askOf(service string) (asked []*grave) {
	p := y.plots[service]
	if p == nil || len(p.unasked) == 0 {
		return nil
	}
	asked = make([]*grave, 0, len(p.unasked))
	for g := range p.unasked {
		asked = append(asked, g)
	}
	clear(p.unasked)
	y.unasked -= len(asked)
	slices.SortFunc(asked, (*grave).compare)
	return asked
}

// askAgain has a node asked once more, the next time that many are: it could not be
// told whether it answers. That is so a few times only.
func (y *graveyard) askAgain(g *grave) {
	if y.byID[g.id()] != g || !y.recent.has(g) || g.again >= maxAgain {
		return
	}
	g.again++
	p := y.plots[g.entry.Node.Service()]
	if _, is := p.unasked[g]; !is {
		p.unasked[g] = struct{}{}
		y.unasked++
	}
}
