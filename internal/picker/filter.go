package picker

import (
	"fmt"
	"slices"
	"strings"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// A Criterion is a condition on a node's metadata.
type Criterion struct {
	Key    string   // of the metadata
	Values []string // one of which it must have
}

func (c Criterion) matches(metadata map[string]string) bool {
	v, ok := metadata[c.Key]
	return ok && slices.Contains(c.Values, v)
}

// A Query is what a request asks for.
type Query struct {
	// ByService says that only nodes of Service will do: none if that is "".
	ByService bool
	Service   string
	// ByRoute says that only nodes of Route will do, which is one of Host: none if that is
	// nil.
	ByRoute bool
	Host    string
	Route   *discovery.Route
	// Where are criteria that nodes must fulfil, Prefer those by which they are ranked.
	Where, Prefer []Criterion
}

// candidates returns the nodes of the wanted service, sorted by id.
func (q *Query) candidates(s *discovery.Snapshot) []*discovery.Entry {
	switch {
	case q.ByRoute:
		return q.onRoute()
	case !q.ByService:
		return s.Nodes()
	case q.Service == "":
		return nil
	}
	return s.Service(q.Service)
}

// onRoute returns the nodes of the route, sorted by id.
func (q *Query) onRoute() []*discovery.Entry {
	if q.Route == nil {
		return nil
	}
	if !q.ByService {
		return q.Route.Nodes
	}
	var nodes []*discovery.Entry
	for _, e := range q.Route.Nodes {
		if q.Service != "" && e.Node.Service() == q.Service {
			nodes = append(nodes, e)
		}
	}
	return nodes
}

// values returns, for each key of a criterion, the values that the nodes have.
func (q *Query) values(nodes []*discovery.Entry) map[string]map[string]bool {
	values := make(map[string]map[string]bool)
	for _, c := range slices.Concat(q.Where, q.Prefer) {
		values[c.Key] = make(map[string]bool)
	}
	for _, e := range nodes {
		for key, known := range values {
			if v, ok := e.Node.Metadata[key]; ok && !known[v] {
				known[v] = true
			}
		}
	}
	return values
}

// key identifies a query among those of one source. The lengths keep values that
// contain separators apart.
func (q *Query) key() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d:%s", len(q.Service), q.Service)
	if q.Route != nil {
		fmt.Fprintf(&b, "|%d:%s%s", len(q.Host), q.Host, q.Route.Path)
	}
	for _, criteria := range [][]Criterion{q.Where, q.Prefer} {
		for _, c := range criteria {
			fmt.Fprintf(&b, "|%d", len(c.Values))
			for _, v := range c.Values {
				fmt.Fprintf(&b, ",%d:%s", len(v), v)
			}
		}
	}
	return b.String()
}

// A Reason says in a few words why a node gets no request; "" if it may get some.
type Reason string

// The reasons that are compared with. There are others: a state of the node, "weight
// 0", "scheme", "where <key>" and what [Filter] is given.
const (
	Unhealthy    Reason = "unhealthy"
	NotChecked   Reason = "unhealthy: not checked yet"
	OtherService Reason = "service"
	NoHosts      Reason = "route: no hosts"
	Ejected      Reason = "ejected"
)

// Unhealthy reports whether it is the health checks that keep the node out.
func (r Reason) Unhealthy() bool { return r == Unhealthy || r == NotChecked }

// A Filter says which nodes a source uses. Its funcs may be called by many goroutines
// at once.
type Filter struct {
	// Scheme is what the endpoint of a node must name, if it names any.
	Scheme string
	// Proxies admits nodes with the role "proxy".
	Proxies bool
	// Own reports whether this process wrote the record with the token.
	Own func(instance string) bool
	// Denied returns why the endpoint of a node may not be used.
	Denied func(*discovery.Entry) Reason
	// Check returns what the health checks have against a node. Nil: without checks.
	Check func(*discovery.Entry) Reason
	// Ejected reports whether requests to a node have failed so often that it gets none for
	// some time. Nil: nobody is.
	Ejected func(*discovery.Entry) bool
}

// Wants reports whether the source uses the node, now or when its state and its checks
// allow it.
func (f *Filter) Wants(e *discovery.Entry, q *Query) bool {
	return (!q.ByService || e.Node.Service() == q.Service) && f.mismatch(e, q) == ""
}

// Reason returns why no request gets the node.
func (f *Filter) Reason(e *discovery.Entry, q *Query) Reason {
	if q.ByService && e.Node.Service() != q.Service {
		return OtherService
	}
	return f.reason(e, q)
}

// Fit reports whether some requests could get the node if it were not ejected.
func (f *Filter) Fit(e *discovery.Entry, q *Query) bool {
	return (!q.ByService || e.Node.Service() == q.Service) && f.unfit(e, q) == ""
}

// reason returns why no request for the node's service gets it.
func (f *Filter) reason(e *discovery.Entry, q *Query) Reason {
	reason := f.unfit(e, q)
	if reason == "" && f.Ejected != nil && f.Ejected(e) {
		return Ejected
	}
	return reason
}

// unfit returns why no request for the node's service gets it whether or not it is
// ejected.
func (f *Filter) unfit(e *discovery.Entry, q *Query) Reason {
	reason := f.ineligible(e, q)
	if reason == "" && f.Check != nil {
		reason = f.Check(e)
	}
	return reason
}

// Keeps reports whether the node keeps the sessions that it has: also one that drains or
// has weight 0, and gets no new ones. One that is to be checked first keeps them, too: it
// is no news about a session that this process, or its node, has just begun.
func (f *Filter) Keeps(e *discovery.Entry, q *Query) bool {
	switch {
	case q.ByService && e.Node.Service() != q.Service, e.State() == discovery.StateMaintenance, f.mismatch(e, q) != "":
		return false
	case f.Ejected != nil && f.Ejected(e):
		return false
	case f.Check == nil:
		return true
	}
	reason := f.Check(e)
	return reason == "" || reason == NotChecked
}

// ineligible returns why no request gets the node whatever its checks say.
func (f *Filter) ineligible(e *discovery.Entry, q *Query) Reason {
	switch {
	case e.Weight() == 0 && e.Node.State() == discovery.StateUp:
		return "weight 0"
	case !e.Serves():
		return Reason(e.State())
	}
	return f.mismatch(e, q)
}

// mismatch returns why the source does not use the node whatever its state.
func (f *Filter) mismatch(e *discovery.Entry, q *Query) Reason {
	n := &e.Node
	switch {
	case n.Endpoint.Scheme != "" && n.Endpoint.Scheme != f.Scheme:
		return "scheme"
	case f.Own(e.Instance()):
		return "this process itself"
	case e.Proxy() && !f.Proxies:
		return "role proxy"
	case q.ByRoute && e.Node.Metadata[discovery.KeyHosts] == "":
		return NoHosts
	}
	for _, c := range q.Where {
		if !c.matches(n.Metadata) {
			return Reason("where " + c.Key)
		}
	}
	return f.Denied(e)
}

// Reasons counts why no request gets the nodes of the wanted service, and how many
// there are.
func (f *Filter) Reasons(s *discovery.Snapshot, q *Query) (reasons map[Reason]int, candidates int) {
	reasons = make(map[Reason]int)
	nodes := q.candidates(s)
	for _, e := range nodes {
		reasons[f.reason(e, q)]++
	}
	return reasons, len(nodes)
}
