package balance

import (
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

func TestShares(t *testing.T) {
	for name, c := range map[string]struct {
		members []Member
		want    []float64 // of the first one's share
	}{
		"nobody reports a load":       {[]Member{{1, 500, 0, 0}, {3, 500, 0, 0}}, []float64{1, 3}},
		"equal loads":                 {[]Member{{1, 0, 0, 0.5}, {3, 0, 0, 0.5}}, []float64{1, 3}},
		"equal loads, by weight":      {[]Member{{1, 250, 0, 0.5}, {3, 750, 0, 0.5}}, []float64{1, 3}},
		"of equal nodes":              {[]Member{{1, 0, 0, 0.9}, {1, 0, 0, 0.3}, {1, 0, 0, 0.1}}, []float64{1, 3, 9}},
		"in any unit":                 {[]Member{{1, 0, 0, 900}, {1, 0, 0, 300}, {1, 0, 0, 100}}, []float64{1, 3, 9}},
		"what is served counts":       {[]Member{{1, 300, 0, 0.5}, {1, 900, 0, 0.5}}, []float64{1, 1500. / 900}},
		"a load of nothing":           {[]Member{{1, 0, 0, 0.5}, {1, 0, 0, 0.5}, {1, 0, 0, 0}}, []float64{1, 1, 2}},
		"hardly any load":             {[]Member{{1, 0, 0, 0.5}, {1, 0, 0, 0.5}, {1, 0, 0, 1e-9}}, []float64{1, 1, 10}},
		"it has just joined":          {[]Member{{1, 990, 0, 0.5}, {1, 0, 0, 1e-9}}, []float64{1, 495 / 1485. / (1 - 0.9*10/505)}},
		"what one reports moves none": {[]Member{{1, 0, 0, 0.5}, {1, 0, 0, 0.5}, {1, 0, 0, 1e300}}, []float64{1, 1, 0}},
		"errors":                      {[]Member{{1, 100, 0, 0}, {1, 100, 100, 0}}, []float64{1, 1. / 11}},
		"errors make no load":         {[]Member{{1, 100, 0, 0.5}, {1, 100, 100, 0}}, []float64{1, 1 / 10.5}},
		"one error of one request":    {[]Member{{1, 0, 0, 0}, {1, 1, 1, 0}}, []float64{1, 0.5}},
	} {
		shares := Shares(c.members, nil)
		for i, want := range c.want {
			if got := shares[i] / shares[0]; math.Abs(got-want) > 1e-9 {
				t.Errorf("%s: shares %v, want them as %v", name, shares, c.want)
				break
			}
		}
	}
	if got := Shares(nil, nil); len(got) != 0 {
		t.Errorf("shares %v of nobody", got)
	}
}

// TestSharesOfManyGoByTheMedianOfSome has ten thousand nodes.
func TestSharesOfManyGoByTheMedianOfSome(t *testing.T) {
	members := make([]Member, 10_000)
	for i := range members {
		members[i] = Member{Weight: 1, Load: 1 + float64(i%11)/10}
	}
	if got := usualLoad(members); math.Abs(got-1.5) > 0.2 {
		t.Errorf("the usual load is %v, want about 1.5", got)
	}
}

// TestSharesEvenLoadsOut has nodes of unequal power report what they use of it: their shares
// come near what they can serve, and stay there.
func TestSharesEvenLoadsOut(t *testing.T) {
	power := []float64{100, 200, 400}
	nodes := make([]Usage, len(power))
	now := time.Hour
	var shares []float64
	served := make([]float64, len(power)) // in this second
	for range 300 {
		now += time.Second
		members := make([]Member, len(power))
		for i := range nodes {
			members[i] = nodes[i].Member(now, 1, served[i]/power[i], time.Time{})
		}
		shares = Shares(members, shares[:0])
		sum := shares[0] + shares[1] + shares[2]
		for i, s := range shares {
			served[i] = 350 * s / sum
			for range int(served[i]) {
				nodes[i].Served(now, false)
			}
		}
	}
	for i, p := range power {
		// By equal shares it would be 1.17, 0.58 and 0.29.
		if used := served[i] / p; used < 0.4 || used > 0.7 {
			t.Errorf("the node of power %v serves %v, want all nodes to be used by about a half", p, served[i])
		}
	}
}

// TestLoadsRiseQuicklyAndFallSlowly holds how a load follows the reports.
func TestLoadsRiseQuicklyAndFallSlowly(t *testing.T) {
	var u Usage
	now := time.Hour
	for _, step := range []struct {
		after              time.Duration
		report, from, upTo float64
	}{
		{0, 0.1, 0.1, 0.1},
		{loadRise, 0.9, 0.6, 0.62},
		{10 * loadRise, 0.9, 0.89, 0.9},
		{loadFall, 0.1, 0.39, 0.41},
	} {
		now += step.after
		if got := u.Member(now, 1, step.report, time.Time{}).Load; got < step.from || got > step.upTo {
			t.Errorf("after %v of %v the load is %v, want %v to %v", step.after, step.report, got, step.from, step.upTo)
		}
	}
}

// TestNewestReportCounts has a node report in its responses and by its record.
func TestNewestReportCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		since := func() time.Duration { return time.Since(began) }
		var u Usage
		load := func(record float64, heard time.Time, want float64) {
			t.Helper()
			time.Sleep(10 * loadFall)
			if got := u.Member(since(), 1, record, heard).Load; math.Abs(got-want) > 0.01*max(want, 0.1) {
				t.Errorf("the load is %v, want %v", got, want)
			}
		}
		load(0.5, time.Now(), 0.5)
		u.Report(0.9)
		load(0.5, began, 0.9)      // the record is older
		load(0.5, time.Now(), 0.5) // or newer
		u.Report(0.9)
		load(0, time.Now(), 0.9) // or says nothing
		load(0, time.Now(), 0)   // until the report is old
	})
}

func TestServedIsForgotten(t *testing.T) {
	var u Usage
	now := time.Hour
	for range 100 {
		u.Served(now, true)
	}
	m := u.Member(now+servedDecay, 1, 0, time.Time{})
	if math.Abs(m.Served-100/math.E) > 0.01 || m.Served != m.Failed {
		t.Errorf("%+v after %v, want a third of 100 to be left", m, servedDecay)
	}
}

func TestLessBusy(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2)).Uint64
	for name, c := range map[string]struct {
		shares   []float64
		inFlight []int
		want     []float64
	}{
		"idle":             {[]float64{1, 3}, []int{0, 0}, []float64{0.25, 0.75}},
		"busy by share":    {[]float64{1, 3}, []int{2, 6}, []float64{0.25, 0.75}},
		"busier":           {[]float64{1, 1}, []int{1, 2}, []float64{0.75, 0.25}},
		"one has none":     {[]float64{0, 1}, []int{0, 9}, []float64{0, 1}},
		"there is but one": {[]float64{7}, []int{9}, []float64{1}},
	} {
		const choices = 4000
		counts, expected := make(map[string]int), make(map[string]float64)
		for i, share := range c.want {
			if share > 0 {
				expected[fmt.Sprint(i)] = share * choices
			}
		}
		for range choices {
			counts[fmt.Sprint(LessBusy(c.shares, func(i int) int { return c.inFlight[i] }, random))]++
		}
		chancetest.Check(t, name, counts, expected)
	}
	if got := LessBusy(nil, nil, random); got != -1 {
		t.Errorf("chose %d of none", got)
	}
}

func TestManyUseOneUsage(t *testing.T) {
	var u Usage
	var users sync.WaitGroup
	for range 8 {
		users.Go(func() {
			for i := range 1000 {
				now := time.Duration(i) * time.Millisecond
				u.Served(now, i%2 == 0)
				u.Report(0.5)
				if m := u.Member(now, 1, 0.5, time.Now()); math.IsNaN(m.Served) || math.IsNaN(m.Load) {
					t.Errorf("%+v", m)
				}
			}
		})
	}
	users.Wait()
}
