package discovery

// writer tells who wrote a record: the process, or where that does not say, the
// endpoint.
func writer(n *Node) string {
	if instance := n.Instance(); instance != "" {
		return instance
	}
	return n.Endpoint.String()
}

// watchFight notices two processes that announce one id: when a record changes
// hands, and is back in the first ones within a lease. A node that merely moves, or
// is replaced by its successor, does not come back. It is said once, because it
// goes on with every heartbeat.
func (l *loop) watchFight(t *tracked, next *Node) {
	was, is := writer(&t.entry.Node), writer(next)
	if was == is {
		return
	}
	at := now()
	if is == t.rival && at-t.replaced < t.entry.lease && !t.fought {
		t.fought = true
		l.log.Warn("two processes announce the same node and overwrite each other's record; give each an id of its own",
			"node", next.ID,
			"endpoints", []string{t.entry.Node.Endpoint.String(), next.Endpoint.String()},
			"writers", []string{was, is})
	}
	t.rival, t.replaced = was, at
}
