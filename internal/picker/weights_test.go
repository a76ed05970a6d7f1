package picker

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

// checkWeights holds what is derived from weights against what they say.
func checkWeights(t *testing.T, nodes []*discovery.Entry) {
	t.Helper()
	if len(nodes) == 0 {
		return
	}
	r := newRing(nodes, nil)
	if len(r.points) > 130*len(nodes) || len(r.points) != cap(r.points) {
		t.Errorf("the ring of %d nodes has %d points and room for %d", len(nodes), len(r.points), cap(r.points))
	}
	if has, counted := 8*cap(r.points)+4*len(r.starts)+4*len(r.counts), ringBytes(len(nodes), len(r.points)); has != counted {
		t.Errorf("the ring takes %d bytes, and counts as %d", has, counted)
	}
	of := make([]uint32, len(nodes))
	for _, p := range r.points {
		of[uint32(p)]++
	}
	sum := 0.0
	for i, e := range nodes {
		sum += e.Weight()
		if of[i] != r.counts[i] || of[i] < 1 || of[i] > maxPoints {
			t.Errorf("node %d of weight %v has %d points, want %d", i, e.Weight(), of[i], r.counts[i])
		}
		for j := range i {
			if (nodes[j].Weight() < e.Weight()) && of[j] > of[i] {
				t.Errorf("weight %v has %d points, and %v has %d", nodes[j].Weight(), of[j], e.Weight(), of[i])
			}
		}
	}
	if table := newAliasTable(weightsOf(nodes)); table != nil {
		shares := make([]float64, len(nodes))
		for i, slot := range table {
			kept := float64(slot.keep) / math.MaxUint32 / float64(len(nodes))
			shares[i] += kept
			shares[slot.other] += 1/float64(len(nodes)) - kept
		}
		for i, e := range nodes {
			// The least weights that there are have no fractions.
			if want := e.Weight() / sum; math.Abs(shares[i]-want) > 1e-6 {
				t.Errorf("weight %v of %v is drawn with probability %v, want %v", e.Weight(), sum, shares[i], want)
			}
		}
	}
	drawn := make(map[*discovery.Entry]bool)
	for _, e := range (&tier{nodes: nodes}).draw(len(nodes), &attempt{builder: newBuilder()}, nil) {
		drawn[e] = true
	}
	if len(drawn) != len(nodes) {
		t.Errorf("%d of %d nodes were drawn, want each once", len(drawn), len(nodes))
	}
}

func TestOddWeights(t *testing.T) {
	odd := []float64{math.SmallestNonzeroFloat64, 7e-324, 1e-310, 2.3e-308, 1e-300, 1e-9, 0.1, 1, 3, 1e5, discovery.MaxWeight}
	random := rand.New(rand.NewPCG(1, 2))
	for round := range 60 {
		weights := make([]float64, 1+random.IntN(40))
		few := 1 + random.IntN(3) // kinds
		for i := range weights {
			weights[i] = odd[(round+i%few*random.IntN(len(odd)))%len(odd)]
		}
		checkWeights(t, weighted(t, weights...))
		if t.Failed() {
			t.Fatalf("with weights %v", weights)
		}
	}
}

// TestLeastWeights has a large fleet of the least weight that there is: its ring is
// as large as that of any other.
func TestLeastWeights(t *testing.T) {
	weights := make([]float64, 5000)
	for i := range weights {
		weights[i] = math.SmallestNonzeroFloat64
	}
	nodes := weighted(t, weights...)
	if len(nodes) != len(weights) {
		t.Fatalf("%d nodes are listed, want %d", len(nodes), len(weights))
	}
	r := newRing(nodes, nil)
	t.Logf("%d points, %d KiB", len(r.points), ringBytes(len(nodes), len(r.points))>>10)
	if len(r.points) != len(nodes)*pointsPerWeight {
		t.Errorf("%d points, want %d", len(r.points), len(nodes)*pointsPerWeight)
	}
}

// TestLeastWeightsAreDrawnAlike looks at every node, as a draw does when most of its
// tries are in vain.
func TestLeastWeightsAreDrawnAlike(t *testing.T) {
	least := math.SmallestNonzeroFloat64
	nodes := weighted(t, least, least, least, least, least)
	tier, a := &tier{nodes: nodes}, &attempt{builder: newBuilder()}
	counts, expected := make(map[string]int), make(map[string]float64)
	for range 5000 {
		for _, e := range tier.drawRest(1, a, nil) {
			counts[e.Node.ID]++
		}
	}
	for _, e := range nodes {
		expected[e.Node.ID] = 1000
	}
	chancetest.Check(t, "drawn", counts, expected)
}

func FuzzWeights(f *testing.F) {
	add := func(weights ...float64) {
		var data []byte
		for _, w := range weights {
			data = binary.LittleEndian.AppendUint64(data, math.Float64bits(w))
		}
		f.Add(data)
	}
	add(1, 2, 3)
	add(math.SmallestNonzeroFloat64, discovery.MaxWeight, 1)
	add(math.SmallestNonzeroFloat64, 1e-310, 1e-323)
	f.Fuzz(func(t *testing.T, data []byte) {
		var weights []float64
		for ; len(data) >= 8 && len(weights) < 50; data = data[8:] {
			weights = append(weights, math.Abs(math.Float64frombits(binary.LittleEndian.Uint64(data))))
		}
		checkWeights(t, weighted(t, weights...))
	})
}
