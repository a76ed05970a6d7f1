package discovery

// counts counts the nodes in use, the suspects among them, and the nodes that lapsed
// lately, of all and of each service. Only nodes count that somebody may use.
type counts struct {
	all      count
	services map[string]*count
}

// count is how many nodes are in use, how many of them are suspect, and how many
// lapsed lately and are gone.
type count struct{ nodes, suspects, gone int }

// counted is as what a node in use was counted: the zero counted is no node at all.
type counted struct {
	service string
	count
}

func newCounts() *counts { return &counts{services: make(map[string]*count)} }

// update counts a node in use as is that was counted as was.
func (c *counts) update(was *counted, is counted) {
	if *was != is {
		c.add(was.service, was.count, -1)
		c.add(is.service, is.count, +1)
		*was = is
	}
}

func (c *counts) add(service string, n count, times int) {
	if n == (count{}) {
		return
	}
	of := c.services[service]
	if of == nil {
		of = new(count)
		c.services[service] = of
	}
	for _, t := range []*count{&c.all, of} {
		t.nodes += times * n.nodes
		t.suspects += times * n.suspects
		t.gone += times * n.gone
	}
	if *of == (count{}) {
		delete(c.services, service)
	}
}

// of returns the count of a service.
func (c *counts) of(service string) count {
	if of := c.services[service]; of != nil {
		return *of
	}
	return count{}
}
