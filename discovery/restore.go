package discovery

import (
	"errors"
	"time"
)

// Restore asks for the last known list, if the registry has not been listed yet:
// its nodes are used from when they accept a connection to the end of the first
// listing. It returns at once, may be called from any goroutine and any number of
// times, and does nothing without [Options.WarmStart].
func (d *Directory) Restore() {
	select {
	case d.restore <- struct{}{}:
	default:
	}
}

// onLoad takes in the saved list, nil if there is none.
func (l *loop) onLoad(list *savedList) {
	if list == nil {
		l.dir.certificates.load(nil)
		return
	}
	l.dir.certificates.load(list.certificates)
	l.hosts.remember(list.hosts)
	if l.overrides.known.IsZero() {
		l.overrides.all, l.overrides.known = list.overrides, list.Overrides
		l.applyOverrides()
	}
	if list.outdated {
		return
	}
	if !l.watch.listedOnce() {
		l.restorer.list = list
		l.beginRestore()
	} else if l.watch.last.Partial {
		l.awaitSaved(list)
	}
}

// beginRestore begins to use the saved list, if it may.
func (l *loop) beginRestore() {
	if !l.restorer.begin() {
		return
	}
	list := l.restorer.list
	l.log.Warn("the registry cannot be listed yet; nodes that were listed before are used as soon as they accept connections",
		"nodes", len(list.nodes), "known", time.Since(list.Written).Round(time.Second))
	l.dir.setCondition(func(c *condition) { c.known = list.Written })
}

// awaitSaved is for a first listing that shows by silence nothing about anybody: nodes
// of the saved list that it lacks come into use when they accept a connection, and then
// have one lease to be heard, or when they are heard.
func (l *loop) awaitSaved(list *savedList) {
	for i := range list.nodes {
		saved := &list.nodes[i]
		if l.table.nodes[saved.node.ID] != nil || l.suspicion.lapsed.byID[saved.node.ID] != nil {
			continue
		}
		n := &lapsedNode{entry: saved.entry(l.dir.options.TTL), key: saved.key, saved: true}
		if l.suspicion.lapsed.addAsked(n, now()) {
			l.probeLapsed(n)
		}
	}
}

// endRestore is part of the end of the first listing: it decides about the nodes of the
// saved list that the listing lacks, and returns how many of them stay in use and have
// one lease to be heard.
func (l *loop) endRestore(listed Listing, at time.Duration) (awaited int) {
	list, nodes := l.restorer.end()
	if nodes == nil {
		if list != nil && listed.Partial {
			l.awaitSaved(list)
		}
		return 0
	}
	l.publisher.endRestored() // unless they stay in use
	lost := listed.Epoch != list.Epoch || listed.Revision < list.Revision
	for id, n := range nodes {
		switch {
		case l.table.nodes[id] != nil:
		case !n.inUse:
			l.publisher.change(id, nil)
			if listed.Partial && l.suspicion.lapsed.byID[id] == nil {
				l.suspicion.lapsed.add(&lapsedNode{entry: n.entry.in(alive), key: n.key}, at, true) // it may be heard
			}
		case l.keepRestored(n, nodes, listed, lost, at):
			awaited++
		default:
			l.publisher.change(id, nil)
		}
	}
	return awaited
}

// keepRestored puts a node that is in use by the saved list into the table, unless the
// first listing proves by the same rules as after an outage that it is gone, or there
// is no place for it. It reports whether it did.
func (l *loop) keepRestored(n *restorable, nodes map[string]*restorable, listed Listing, lost bool, at time.Duration) bool {
	// What was rejected before the list was in use is known only here.
	if err := l.rejections.of(n.record(), l.watch.number); err != nil && !errors.Is(err, ErrForbidden) {
		n.rejected, n.watch = err, l.watch.number
	}
	rejected := n.rejected != nil && n.watch == l.watch.number
	if !rejected && !lost && listed.provesGone(at-time.Duration(n.entry.liveness.heard.Load()), n.entry.lease) {
		return false
	}
	t := &tracked{entry: n.entry, key: n.key, presence: restored, forbidden: n.forbidden}
	if o := l.addressConflict(t); o != nil {
		// A node that was in the list at the same address has shared it before.
		saved := nodes[o.id()]
		if saved == nil || saved.entry.Node.Endpoint.Address() != n.entry.Node.Endpoint.Address() {
			return false
		}
	}
	if !l.table.admits(&t.entry.Node, t.key) {
		return false
	}
	if t.entry.named {
		l.setAddresses(t.entry.Node.Endpoint.Host(), t.entry.addresses)
	}
	t.entry.liveness.renewed.Store(int64(at))
	l.insert(t)
	if rejected {
		l.refuse(t, n.rejected)
	}
	return true
}

// savedList returns what is to be saved.
func (l *loop) savedList() *savedList {
	list := &savedList{
		Written: time.Now(), Epoch: l.watch.last.Epoch, Revision: l.dir.revision.Load(),
		nodes:     make([]savedNode, 0, len(l.table.nodes)),
		overrides: l.overrides.all, Overrides: l.overrides.known,
		hosts: l.hosts.all(), certificates: l.dir.certificates.all(),
	}
	if !l.watch.listed {
		list.Written = processStart.Add(l.watch.lostAt)
	}
	if l.overrides.watch == l.watch.lastListed {
		list.Overrides = list.Written // the watch would have told of a change
	}
	for _, t := range l.table.nodes {
		n := t.entry.Node
		n.Load = t.entry.Load()
		list.nodes = append(list.nodes, savedNode{key: t.key, heard: t.entry.LastHeard(), node: n})
	}
	return list
}
