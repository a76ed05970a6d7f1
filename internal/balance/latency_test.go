package balance

import (
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/internal/chancetest"
)

const decay = 10 * time.Second

// A node is asked and answers, in a time of its own.
type node struct {
	Latency
	now time.Duration
}

// answers has it answer a request after a time, n times, without a pause.
func (n *node) answers(times int, took time.Duration, failed bool) {
	for range times {
		n.Sent(n.now)
		n.now += took
		n.Answered(n.now, took, decay, failed)
	}
}

// known returns a node that has answered in a time for long.
func known(took time.Duration) *node {
	n := &node{now: time.Hour}
	n.answers(100, took, false)
	return n
}

func (n *node) cost(t *testing.T, want float64) {
	t.Helper()
	if got := n.Cost(n.now, decay); math.Abs(got-want) > 0.02*want {
		t.Errorf("the cost is %v, want %v", got, want)
	}
}

func TestWhatIsSlowIsBelievedAtOnce(t *testing.T) {
	n := known(10 * time.Millisecond)
	n.cost(t, 0.010)
	n.answers(1, time.Second, false)
	n.cost(t, 1)
}

// TestWhatWasSlowIsForgottenInTime has a node be quick again after a slow answer: a third
// of it is left after the time constant, less where it has nothing to do in between.
func TestWhatWasSlowIsForgottenInTime(t *testing.T) {
	for pause, want := range map[time.Duration]float64{0: 0.37, 10 * time.Millisecond: 0.14, 90 * time.Millisecond: 0.07} {
		n := known(10 * time.Millisecond)
		n.answers(1, time.Second, false)
		for end := n.now + decay; n.now < end; n.now += pause {
			n.answers(1, 10*time.Millisecond, false)
		}
		if got := n.Cost(n.now, decay); got < 0.85*want || got > 1.15*want {
			t.Errorf("with pauses of %v: after %v the cost is %v, want about %v", pause, decay, got, want)
		}
	}
}

// TestIdleNodeIsTriedAgain has a slow node left alone: its cost decays, and a request that
// tries it brings all of it back for as long as it waits.
func TestIdleNodeIsTriedAgain(t *testing.T) {
	n := known(time.Second)
	n.now += decay / idleForgets
	n.cost(t, 1/math.E)
	n.now += 4 * decay / idleForgets
	n.cost(t, 1/math.Pow(math.E, 5))
	n.Sent(n.now)
	n.cost(t, 1)
	n.now += 10 * time.Millisecond
	n.Answered(n.now, 10*time.Millisecond, decay, false)
	if got := n.Cost(n.now, decay); got > 0.017 {
		t.Errorf("after an answer in 10 ms the cost is %v, want hardly more", got)
	}
}

func TestWaitCounts(t *testing.T) {
	n := known(10 * time.Millisecond)
	n.Sent(n.now)
	n.now += 300 * time.Millisecond
	n.cost(t, 0.300)
	n.Sent(n.now)
	n.now += time.Minute
	n.cost(t, 60.3)
	n.GivenUp(n.now, 60300*time.Millisecond)
	n.cost(t, 60.3)
	n.GivenUp(n.now, time.Minute)
	n.now += decay / idleForgets
	n.cost(t, 60.3/math.E)
}

// TestUploadsDoNotWait has a client take its time to send: the node is as quick as before
// meanwhile, unless it lets another one wait, and from then on until it answers.
func TestUploadsDoNotWait(t *testing.T) {
	n := known(10 * time.Millisecond)
	n.Sent(n.now)
	n.Uploads()
	n.now += 10 * time.Second
	n.cost(t, 0.010)
	n.Sent(n.now)
	n.now += time.Second
	n.cost(t, 1)
	n.Answered(n.now, 10*time.Millisecond, decay, false)
	n.now += time.Second
	n.cost(t, 0.010)
	n.Uploaded(n.now)
	n.now += 2 * time.Second
	n.cost(t, 2)
	n.Answered(n.now, 10*time.Millisecond, decay, false)
	n.cost(t, 0.010)
	// The answer may be known before the end of the upload is.
	n.Sent(n.now)
	n.Uploads()
	n.Answered(n.now, 10*time.Millisecond, decay, false)
	n.Uploaded(n.now)
	n.Sent(n.now)
	n.now += time.Second
	n.cost(t, 1)
}

func TestErrorsCountAsSlow(t *testing.T) {
	n := known(10 * time.Millisecond)
	n.answers(1, time.Millisecond, true)
	n.cost(t, 0.020)
	n.answers(9, time.Millisecond, true)
	n.cost(t, 10.24)
	n.answers(1000, time.Millisecond, true)
	n.cost(t, 10.24)
	n.now += 2 * decay
	if got := n.Cost(n.now, decay); got > 0.3 {
		t.Errorf("left alone for %v the cost is still %v", 2*decay, got)
	}
	n.answers(100, 10*time.Millisecond, false)
	n.cost(t, 0.010)
}

// TestFewErrorsCountForLittle has one request in twenty fail, as may be of any service.
func TestFewErrorsCountForLittle(t *testing.T) {
	n, sum := known(10*time.Millisecond), 0.0
	random := rand.New(rand.NewPCG(1, 2))
	for range 10_000 {
		n.answers(1, 10*time.Millisecond, random.IntN(20) == 0)
		sum += n.Cost(n.now, decay)
	}
	if mean := sum / 10_000; mean > 0.030 {
		t.Errorf("the cost was %v on average, want the errors to be forgotten between them", mean)
	}
}

func TestBrokenAnswersCount(t *testing.T) {
	n := known(10 * time.Millisecond)
	for range 3 {
		n.BrokeOff()
	}
	n.cost(t, 0.080)
}

// TestNewNodeGetsOneRequestAtATime until it is known. The first answer, over a new
// connection, is not held against it.
func TestNewNodeGetsOneRequestAtATime(t *testing.T) {
	n := &node{now: time.Hour}
	for i := range firstAnswers {
		if got := n.Cost(n.now, decay); got != 0 {
			t.Errorf("after %d answers the cost is %v, want 0", i, got)
		}
		n.Sent(n.now)
		if got := n.Cost(n.now, decay); got == 0 {
			t.Errorf("while request %d waits the cost is 0, want it to be left alone", i)
		}
		took := 10 * time.Millisecond
		if i == 0 {
			took = time.Second
		}
		n.now += took
		n.Answered(n.now, took, decay, false)
	}
	n.cost(t, 0.010)

	broken := &node{now: time.Hour}
	broken.answers(firstAnswers, time.Millisecond, true)
	if got := broken.Cost(broken.now, decay); got < 1 {
		t.Errorf("a node that has only failed costs %v, want at least a second", got)
	}
}

func TestManyUseOneLatency(t *testing.T) {
	var l Latency
	var users sync.WaitGroup
	for range 8 {
		users.Go(func() {
			for i := range 1000 {
				now := time.Duration(i) * time.Millisecond
				l.Sent(now)
				_ = l.Cost(now, decay)
				switch i % 3 {
				case 0:
					l.GivenUp(now, time.Millisecond)
				default:
					l.Answered(now, time.Millisecond, decay, i%7 == 0)
				}
			}
		})
	}
	users.Wait()
	if n := l.waiting.Load(); n != 0 {
		t.Errorf("%d requests wait for ever", n)
	}
}

func TestSoonest(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2)).Uint64
	for name, c := range map[string]struct {
		candidates []Candidate
		want       []float64 // shares
	}{
		"the quickest":        {[]Candidate{{0.1, 0, 1, 1, false}, {0.01, 0, 1, 1, false}, {1, 0, 1, 1, false}}, []float64{0, 1, 0}},
		"about as quick":      {[]Candidate{{0.010, 0, 1, 1, false}, {0.012, 0, 1, 1, false}, {0.013, 0, 1, 1, false}}, []float64{0.5, 0.5, 0}},
		"by weight":           {[]Candidate{{0.010, 0, 1, 1, false}, {0.010, 0, 3, 3, false}}, []float64{0.25, 0.75}},
		"busy by weight":      {[]Candidate{{0.010, 2, 1, 1, false}, {0.010, 6, 3, 3, false}}, []float64{0.25, 0.75}},
		"in flight":           {[]Candidate{{0.010, 3, 1, 1, false}, {0.020, 0, 1, 1, false}}, []float64{0, 1}},
		"to be known":         {[]Candidate{{0.010, 0, 1, 1, false}, {0, 0, 1, 1, false}}, []float64{0, 1}},
		"none is known":       {[]Candidate{{0, 0, 1, 1, false}, {0, 0, 1, 1, false}}, []float64{0.5, 0.5}},
		"new and quick":       {[]Candidate{{0.010, 0, 1, 1, false}, {0.001, 0, 0.25, 0.25, true}}, []float64{0.8, 0.2}},
		"new and slow":        {[]Candidate{{0.010, 0, 1, 1, false}, {0.100, 0, 0.25, 0.25, true}}, []float64{1, 0}},
		"new and to be known": {[]Candidate{{0.010, 0, 1, 1, false}, {0, 0, 0.25, 0.25, true}}, []float64{0.8, 0.2}},
		"all are new":         {[]Candidate{{0.010, 0, 1, 1, true}, {0.1, 0, 1, 1, true}}, []float64{1, 0}},
		"odds":                {[]Candidate{{0.010, 0, 5, 1, false}, {0.010, 0, 1, 1, false}}, []float64{0.5, 0.5}},
		"the first":           {[]Candidate{{0.010, 0, 5, 0, false}, {0.009, 0, 1, 0, false}}, []float64{1, 0}},
		"none":                {nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			if c.want == nil {
				if got := Soonest(nil, random); got != -1 {
					t.Errorf("chose %d of none", got)
				}
				return
			}
			const choices = 4000
			counts, expected := make(map[string]int), make(map[string]float64)
			for i, share := range c.want {
				if share > 0 {
					expected[fmt.Sprint(i)] = share * choices
				}
			}
			for range choices {
				counts[fmt.Sprint(Soonest(c.candidates, random))]++
			}
			chancetest.Check(t, "chosen", counts, expected)
		})
	}
}
