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

// counted is as what a node in use was counted.
type counted struct {
	service  string
	nodes    int // 0 or 1
	suspects int // 0 or 1
}

func newCounts() *counts { return &counts{services: make(map[string]*count)} }

// update counts a node in use as is that was counted as was. The zero counted is no
// node at all.
func (c *counts) update(was *counted, is counted) {
	if *was == is {
		return
	}
	c.add(was.service, count{nodes: -was.nodes, suspects: -was.suspects})
	c.add(is.service, count{nodes: is.nodes, suspects: is.suspects})
	*was = is
}

func (c *counts) add(service string, n count) {
	if n == (count{}) {
		return
	}
	of := c.services[service]
	if of == nil {
		of = new(count)
		c.services[service] = of
	}
	for _, t := range []*count{&c.all, of} {
		t.nodes, t.suspects, t.gone = t.nodes+n.nodes, t.suspects+n.suspects, t.gone+n.gone
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
