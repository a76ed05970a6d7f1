package picker

import (
	"math"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// An aliasTable draws an index in proportion to the weights, by one look at it:
// A. J. Walker, "An efficient method for generating discrete random variables with
// general distributions", 1977. Nil draws all alike.
type aliasTable []aliasSlot

type aliasSlot struct {
	keep  uint32 // up to here the slot's own index, beyond it the other
	other uint32
}

func newAliasTable(weights []float64) aliasTable {
	if len(weights) == 0 {
		return nil
	}
	sum, same := 0.0, true
	for _, w := range weights {
		sum += w
		same = same && w == weights[0]
	}
	if same {
		return nil
	}
	// What each index has and how much one slot holds, in units of the mean.
	table := make(aliasTable, len(weights))
	share := make([]float64, len(weights))
	var poor, rich []uint32
	for i, w := range weights {
		share[i] = w / sum * float64(len(weights))
		if share[i] < 1 {
			poor = append(poor, uint32(i))
		} else {
			rich = append(rich, uint32(i))
		}
	}
	for len(poor) > 0 && len(rich) > 0 {
		p, r := poor[len(poor)-1], rich[len(rich)-1]
		poor = poor[:len(poor)-1]
		table[p] = aliasSlot{keep: uint32(share[p] * math.MaxUint32), other: r}
		if share[r] -= 1 - share[p]; share[r] < 1 {
			rich = rich[:len(rich)-1]
			poor = append(poor, r)
		}
	}
	for _, i := range append(poor, rich...) { // what rounding has left
		table[i] = aliasSlot{keep: math.MaxUint32, other: i}
	}
	return table
}

func (t *tier) weights() aliasTable {
	t.tableOnce.Do(func() { t.table, t.weight = newAliasTable(weightsOf(t.nodes)), weigh(t.nodes) })
	return t.table
}

func weightsOf(nodes []*discovery.Entry) []float64 {
	weights := make([]float64, len(nodes))
	for i, e := range nodes {
		weights[i] = e.Weight()
	}
	return weights
}

// unit makes a number in [0, 1) of a random one.
func unit(x uint64) float64 { return float64(x>>11) / (1 << 53) }
