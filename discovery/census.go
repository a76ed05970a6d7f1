package discovery

// A census counts the nodes in use, and those among them whose lease ran out and
// which stay because they may live: of all, and of each service. Only nodes count
// that somebody may use.
type census struct {
	all      tally
	services map[string]*tally
}

// tally counts nodes: how many there are, and of how many the lease ran out.
type tally struct{ nodes, doubted int }

// counted is as what a node was counted.
type counted struct {
	service string
	nodes   int // 0 or 1
	doubted int // 0 or 1
}

func newCensus() census { return census{services: make(map[string]*tally)} }

// count counts a node that was counted as was, as is from now on. The zero counted
// is no node at all.
func (c *census) count(was *counted, is counted) {
	if *was == is {
		return
	}
	c.add(*was, -1)
	c.add(is, +1)
	*was = is
}

func (c *census) add(n counted, times int) {
	if n.nodes == 0 {
		return
	}
	t := c.services[n.service]
	if t == nil {
		t = new(tally)
		c.services[n.service] = t
	}
	for _, t := range []*tally{&c.all, t} {
		t.nodes += times * n.nodes
		t.doubted += times * n.doubted
	}
	if t.nodes == 0 {
		delete(c.services, n.service)
	}
}

// of returns the tally of a service.
func (c *census) of(service string) tally {
	if t := c.services[service]; t != nil {
		return *t
	}
	return tally{}
}
