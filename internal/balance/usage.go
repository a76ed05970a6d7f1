package balance

import (
	"slices"
	"sync"
	"time"
)

// Usage is what a node serves for this process, and by how much of itself. Its methods may
// be called by many goroutines at once. The zero Usage knows nothing.
type Usage struct {
	mu sync.Mutex

	served, failed float64 // requests, of which what lies longer ago counts for less
	counted        time.Duration

	reported   float64 // load, in responses
	reportedAt time.Time

	load   float64 // as Member returned it last
	loadAt time.Duration
}

const (
	// servedDecay is the time constant of what counts as served. It is longer than what a
	// load is the mean of, as a rule: else a share that grows would seem to be served
	// without any load until the node reports it, and grow on.
	servedDecay = 30 * time.Second
	// loadRise and loadFall are the time constants by which a load follows what is
	// reported. A report may be a count at one instant, hence mostly chance; and by the
	// time that a node which was overloaded reports that it idles, all proxies read so.
	loadRise = 3 * time.Second
	loadFall = 10 * time.Second
	// reportCounts is for how long a report in a response counts where the record says
	// nothing: the weight expiration of gRFC A58.
	reportCounts = 3 * time.Minute
)

// Served notes that the node has answered a request, or failed to.
func (u *Usage) Served(now time.Duration, failed bool) {
	u.mu.Lock()
	u.age(now)
	u.served++
	if failed {
		u.failed++
	}
	u.mu.Unlock()
}

// age has the counts be those of a time.
func (u *Usage) age(now time.Duration) {
	left := remains(now-u.counted, servedDecay)
	u.served, u.failed, u.counted = u.served*left, u.failed*left, now
}

// Report notes a load that the node has reported in a response now.
func (u *Usage) Report(load float64) {
	u.mu.Lock()
	u.reported, u.reportedAt = load, time.Now()
	u.mu.Unlock()
}

// Member returns what counts of the node for [Shares]. Load is that of its record, as it
// was heard last. The newest report counts; a record whose load is 0 beside reports in
// responses comes from a writer that knows none.
func (u *Usage) Member(now time.Duration, weight, load float64, heard time.Time) Member {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.reportedAt.IsZero() && time.Since(u.reportedAt) < reportCounts && (load == 0 || u.reportedAt.After(heard)) {
		load = u.reported
	}
	if u.loadAt == 0 || u.load == 0 {
		u.load = load // it has said nothing before
	} else {
		decay := loadRise
		if load < u.load {
			decay = loadFall
		}
		u.load += (load - u.load) * (1 - remains(now-u.loadAt, decay))
	}
	u.loadAt = now
	u.age(now)
	return Member{Weight: weight, Served: u.served, Failed: u.failed, Load: u.load}
}

// A Member is one of the nodes that share the requests.
type Member struct {
	Weight         float64 // greater than 0
	Served, Failed float64
	Load           float64
}

const (
	// leastLoad is the least that a load counts as, in parts of the usual one: a node
	// that does nothing can do more, and nobody knows how much. The less a node serves of
	// what its weight is of all, the nearer that comes to the usual load: one that has just
	// joined does nothing because nobody has sent it anything yet.
	leastLoad = 0.1
	// silentLoad is what a load of 0 counts as, in parts of the usual one: the node idles, or
	// does not say.
	silentLoad = 0.5
	// errorPenalty is what errors add to the load of a node at which all requests fail,
	// in parts of the usual one. What fails makes no load.
	errorPenalty = 10
	// fewServed is how many requests of each node are too few to go by.
	fewServed = 10
	// medianOf is of how many nodes at most the median is taken.
	medianOf = 101
)

// Shares appends the shares of members, in no unit: what they serve by their utilization,
// as in gRFC A58 (https://github.com/grpc/proposal/blob/master/A58-client-side-weighted-round-robin-lb-policy.md).
// That is what a node could serve, whatever the unit of its load.
//
// What a node serves is half what it did serve, and half what its weight is of all that
// was. So equal loads give shares by the weights, and the share of a node whose load has
// nothing to do with what it serves ends somewhere. The load is not less than a tenth of
// the median, and errors add to it. Where nobody reports a load the shares are the weights.
func Shares(members []Member, into []float64) []float64 {
	usual := usualLoad(members)
	var served, weight float64
	for _, m := range members {
		served += m.Served
		weight += m.Weight
	}
	byWeight := max(served, fewServed*float64(len(members))) / weight
	for _, m := range members {
		load := 1.0 // of all alike, if nobody reports any
		if usual > 0 {
			part := (m.Served + fewServed) / (served*m.Weight/weight + fewServed)
			if load = max(m.Load/usual, 1-(1-leastLoad)*min(part, 1)); m.Load == 0 {
				load = max(load, silentLoad)
			}
		}
		if m.Served > 0 {
			load += errorPenalty * m.Failed / max(m.Served, fewServed)
		}
		share := m.Weight
		if usual > 0 {
			share = m.Served + m.Weight*byWeight
		}
		into = append(into, share/load)
	}
	return into
}

// usualLoad returns the median of the loads that are any, 0 if none is: of some of them,
// where they are many. What one node reports moves it by a place.
func usualLoad(members []Member) float64 {
	var room [medianOf]float64
	loads := room[:0]
	step := (len(members) + medianOf - 1) / medianOf
	for i := 0; i < len(members); i += step {
		if l := members[i].Load; l > 0 {
			loads = append(loads, l)
		}
	}
	if len(loads) == 0 {
		return 0
	}
	slices.Sort(loads)
	return loads[len(loads)/2]
}

// LessBusy draws two by their shares and returns the index of the one with fewer requests in
// flight over its share, of two idle ones the first; -1 where nobody has a share.
func LessBusy(shares []float64, inFlight func(i int) int, random func() uint64) int {
	sum := 0.0
	for _, s := range shares {
		sum += s
	}
	draw := func() int {
		at := unit(random()) * sum
		for i, s := range shares {
			if at -= s; at < 0 {
				return i
			}
		}
		return len(shares) - 1 // what rounding has left
	}
	first := draw()
	if first < 0 {
		return -1
	}
	busyness := float64(inFlight(first))
	if busyness == 0 {
		return first
	}
	if second := draw(); float64(inFlight(second))/shares[second] < busyness/shares[first] {
		return second
	}
	return first
}
