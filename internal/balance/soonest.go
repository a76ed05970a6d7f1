package balance

// A Candidate is a node that may get a request.
type Candidate struct {
	Cost     float64 // as Latency.Cost returns it
	InFlight int
	Weight   float64 // greater than 0
	Odds     float64 // among those that are as good; if all have 0, the first of them has it
	New      bool    // it is to get no more than its odds
}

const (
	// MostCandidates is how many candidates Soonest compares at most without an allocation.
	MostCandidates = 8
	// asGood is by what a candidate may be worse than the best and still count as good:
	// two averages of the same thing differ by as much, and who is ahead by a little
	// should not get everything.
	asGood = 1.25
	// unawaited stands for no cost, in seconds.
	unawaited = 1e-9
)

// Soonest returns the index of the candidate whose answer is to be expected soonest: that
// of the least cost × (requests in flight ÷ weight + 1), the weight in units of the mean, and
// of those that are about as good one by its odds; -1 if there is none.
//
// Where all weigh alike that is Finagle's cost × (requests in flight + 1). The weight
// divides the requests in flight and not the 1, so that idle nodes which are equally quick
// get shares by their weights, and not the heaviest of them everything.
func Soonest(candidates []Candidate, random func() uint64) int {
	mean := 0.0
	for _, c := range candidates {
		mean += c.Weight
	}
	mean /= float64(len(candidates))
	var room [MostCandidates]float64
	scores := room[:0]
	least, leastOfNew := 0.0, 0.0
	for _, c := range candidates {
		score := max(c.Cost, unawaited)
		if c.InFlight > 0 {
			score *= float64(c.InFlight)*mean/c.Weight + 1
		}
		scores = append(scores, score)
		to := &least
		if c.New {
			to = &leastOfNew
		}
		if *to == 0 || score < *to {
			*to = score
		}
	}
	if least == 0 {
		least = leastOfNew // all of them are new
	}
	first, good, odds := -1, 0, 0.0
	for i, score := range scores {
		if score <= asGood*least {
			if good++; first < 0 {
				first = i
			}
			odds += candidates[i].Odds
		}
	}
	if good < 2 || odds == 0 {
		return first
	}
	at := unit(random()) * odds
	for i, score := range scores {
		if score <= asGood*least {
			if at -= candidates[i].Odds; at < 0 {
				return i
			}
		}
	}
	return first // what rounding has left
}

// unit makes a number in [0, 1) of a random one.
func unit(x uint64) float64 { return float64(x>>11) / (1 << 53) }
