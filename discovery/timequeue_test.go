package discovery

import (
	"math/rand/v2"
	"testing"
	"time"
)

// Whatever is put in, moved and taken out, the earliest is first.
func TestTimeQueueIsInOrder(t *testing.T) {
	type item struct {
		at    time.Duration
		place int
	}
	q := timeQueue[item]{
		time:  func(i *item) time.Duration { return i.at },
		place: func(i *item) *int { return &i.place },
	}
	random := rand.New(rand.NewPCG(1, 2))
	items := make([]item, 50)
	for range 10_000 {
		i := &items[random.IntN(len(items))]
		if random.IntN(3) > 0 {
			i.at = time.Duration(random.IntN(100))
			q.put(i)
		} else {
			q.remove(i)
			if q.has(i) {
				t.Fatal("an item is there after it was taken out")
			}
		}
		in, earliest := 0, time.Duration(1000)
		for i := range items {
			if q.has(&items[i]) {
				in++
				earliest = min(earliest, items[i].at)
			}
		}
		first := q.first()
		if (first != nil) != (in > 0) || len(q.items) != in || first != nil && first.at != earliest {
			t.Fatalf("of %d items the first is %+v, want one at %d", in, first, earliest)
		}
		if q.firstBy(earliest-1) != nil || q.firstBy(earliest) != first {
			t.Fatal("the first item does not come at its time")
		}
	}
}
