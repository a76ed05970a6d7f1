package discovery

// counts counts the nodes in use and the suspects among them, of all and of each
// service. Only nodes count that somebody may use.
type counts struct {
	all      count
	services map[string]*count
}

// count is how many nodes there are, and of how many the lease ran out.
type count struct{ nodes, suspects int }

// counted is as what a node was counted.
type counted struct {
	service  string
	nodes    int // 0 or 1
	suspects int // 0 or 1
}

func newCounts() counts { return counts{services: make(map[string]*count)} }

// update counts a node as is that was counted as was. The zero counted is no node at
// all.
func (c *counts) update(was *counted, is counted) {
	if *was == is {
		return
	}
	c.add(*was, -1)
	c.add(is, +1)
	*was = is
}

func (c *counts) add(n counted, times int) {
	if n.nodes == 0 {
		return
	}
	t := c.services[n.service]
	if t == nil {
		t = new(count)
		c.services[n.service] = t
	}
	for _, t := range []*count{&c.all, t} {
		t.nodes += times * n.nodes
		t.suspects += times * n.suspects
	}
	if t.nodes == 0 {
		delete(c.services, n.service)
	}
}

// of returns the count of a service.
func (c *counts) of(service string) count {
	if t := c.services[service]; t != nil {
		return *t
	}
	return count{}
}
