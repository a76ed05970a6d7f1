package discovery_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// journalOf returns what a journal holds, oldest first, a line each.
func journalOf(j *discovery.Journal) []string {
	var lines []string
	changes := j.Newest(0, nil)
	for i := len(changes) - 1; i >= 0; i-- {
		c := changes[i]
		line := string(c.Type)
		if c.ID != "" {
			line += " " + c.ID
		}
		if c.Listed {
			line += " (listed)"
		}
		lines = append(lines, line+": "+c.Reason)
	}
	return lines
}

func TestJournalTellsWhatBecameOfNodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("b"), newNode("a"))
		m.Put("bad", []byte(`{"nodeId":"bad","endpoint":"http://{env.HOME}"}`))
		d := follow(t, m.Open(), discovery.Options{TTL: 10 * time.Second})

		time.Sleep(time.Second)
		write(m, newNode("c"))
		synctest.Wait()
		write(m, newNode("c")) // a heartbeat is no news
		synctest.Wait()
		write(m, newNode("c", "weight", "2", "zone", "x"))
		synctest.Wait()
		m.Put("bad", []byte(`{"nodeId":"bad","endpoint":"http://{env.HOME}"}`))
		m.Put("b", []byte(`nonsense`))
		synctest.Wait()
		m.Break()
		synctest.Wait()
		m.Restore()
		reconnect(t, d)
		time.Sleep(11 * time.Second)
		synctest.Wait()

		got := strings.Join(journalOf(d.Journal()), "\n")
		for i, c := range d.Journal().Newest(0, nil) {
			if c.Time.IsZero() || c.Number != d.Journal().Last()-uint64(i) {
				t.Errorf("change %d has number %d and time %v", i, c.Number, c.Time)
			}
		}
		want := []string{
			`rejected bad (listed): invalid endpoint "http://{env.HOME}": placeholders are not accepted`,
			"seen a (listed): it was listed when the registry was first seen",
			"seen b (listed): it was listed when the registry was first seen",
			"connected: listed, 2 nodes", // last, so that no listing is too long for it
			"seen c: ",
			"updated c: weight 2, zone x",
			"rejected b: invalid record: want a JSON object",
			"disconnected: ", // and why
			"connected: back after ",
			"lapsed ", // all three are dialled first, and in whatever order that ends
			"lapsed ",
			"lapsed ",
		}
		lines := strings.Split(got, "\n")
		if len(lines) != len(want) {
			t.Fatalf("the journal has %d lines, want %d:\n%s", len(lines), len(want), got)
		}
		for i := range want {
			if !strings.HasPrefix(lines[i], want[i]) {
				t.Errorf("line %d: %q, want it to begin with %q", i, lines[i], want[i])
			}
		}
		changes, rejected := d.Journal().Counts()
		if changes[discovery.ChangeSeen] != 3 || changes[discovery.ChangeLapsed] != 3 || changes[discovery.ChangeUpdated] != 1 {
			t.Errorf("counted %v", changes)
		}
		if fmt.Sprint(rejected) != "map[endpoint:1 record:1]" {
			t.Errorf("counted rejections %v", rejected)
		}
		if e := d.Journal().Newest(1, nil)[0].Entry; e == nil || e.Node.ID == "" {
			t.Error("a node that lapsed is not shown as it was last")
		}
	})
}

// A first listing that breaks is told of when it is repeated, not twice.
func TestJournalOfABrokenListing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{})
		s := <-w.streams
		s.put("", 1, newNode("a"))
		s.emit(discovery.Event{Type: discovery.Rejected, ID: "bad"})
		s.emit(discovery.Event{Type: discovery.Left, ID: "a"})
		s.end <- errors.New("cut")
		s = <-w.streams
		s.put("", 1, newNode("a"))
		s.sync(discovery.Listing{})
		synctest.Wait()
		got := strings.Join(journalOf(d.Journal()), "\n")
		if want := "seen a (listed): it was listed when the registry was first seen\nconnected: listed, 1 nodes"; got != want {
			t.Errorf("the journal says\n%s\nwant\n%s", got, want)
		}
		s.end <- errors.New("cut")
		s = <-w.streams // or the directory would wait for it
		s.sync(discovery.Listing{})
	})
}

func TestJournalIsBounded(t *testing.T) {
	var j discovery.Journal
	if changes, _ := j.Since(0); changes != nil || j.Newest(0, nil) != nil {
		t.Error("an empty journal holds something")
	}
	const n = 10_000
	for i := 1; i <= n; i++ {
		j.Add(discovery.Change{Type: discovery.ChangeSeen, ID: fmt.Sprint(i)})
	}
	newest := j.Newest(0, nil)
	if len(newest) != 4096 || newest[0].ID != fmt.Sprint(n) || newest[4095].ID != fmt.Sprint(n-4095) {
		t.Errorf("it remembers %d changes, %s to %s", len(newest), newest[len(newest)-1].ID, newest[0].ID)
	}
	if one := j.Newest(1, func(c *discovery.Change) bool { return c.ID == "9000" }); len(one) != 1 || one[0].Number != 9000 {
		t.Errorf("change 9000 was not found: %v", one)
	}
	// A follower that was too slow sees that it missed something, and then all.
	number, seen := uint64(10), 0
	for {
		changes, _ := j.Since(number)
		if changes == nil {
			break
		}
		if seen == 0 && changes[0].Number != n-4095 {
			t.Errorf("it goes on at %d, want the oldest that is left, %d", changes[0].Number, n-4095)
		}
		seen += len(changes)
		number = changes[len(changes)-1].Number
	}
	if seen != 4096 || number != n {
		t.Errorf("the follower saw %d changes up to %d", seen, number)
	}
	if counts, _ := j.Counts(); counts[discovery.ChangeSeen] != n {
		t.Errorf("it counted %v", counts)
	}
}

// However large the records are, they take no more than so many bytes, and neither
// the changes nor the small records of others have to go for them.
func TestJournalIsBoundedInBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newScripted()
		d := follow(t, w, discovery.Options{TTL: 24 * time.Hour})
		s := <-w.streams
		s.sync(discovery.Listing{})
		const changes = 5000
		for i := range changes / 2 {
			s.put("small", 0, newNode("small", "build", fmt.Sprint(i)))
			s.put("large", 0, newNode("large", "version", fmt.Sprint(i), "notes", fmt.Sprintf("%060000d", i)))
		}
		synctest.Wait()
		newest := d.Journal().Newest(0, nil)
		total := 0
		for _, c := range newest {
			if c.Entry == nil {
				continue
			}
			for k, v := range c.Entry.Node.Metadata {
				total += len(k) + len(v)
			}
			if c.ID == "small" && c.Entry.Node.Metadata["build"] == "" {
				t.Fatal("the record of another node was abridged")
			}
			if c.Entry.Node.Service() != "orders" || c.Entry.Node.Metadata["version"] == "" && c.ID == "large" {
				t.Fatalf("a record lost what has a meaning: %.80v", c.Entry.Node.Metadata)
			}
		}
		if len(newest) != 4096 || total > 16<<20 {
			t.Errorf("%d changes with %d bytes of metadata, want 4096 with at most 16 MiB", len(newest), total)
		}
		if e := newest[0].Entry; len(e.Node.Metadata["notes"]) != 60_000 {
			t.Errorf("the newest record has %d bytes of notes", len(e.Node.Metadata["notes"]))
		}
		if got := len(d.Snapshot().Node("large").Node.Metadata["notes"]); got != 60_000 {
			t.Errorf("the node in use has %d bytes of notes", got)
		}
		var j discovery.Journal
		j.Add(discovery.Change{Reason: strings.Repeat("ä", 1_000_000)})
		if got := len(j.Newest(1, nil)[0].Reason); got > 1100 {
			t.Errorf("a reason of %d bytes", got)
		}
	})
}

// Followers are woken, and miss nothing while they keep up.
func TestJournalFollowers(t *testing.T) {
	var j discovery.Journal
	const n = 3000
	var group sync.WaitGroup
	for range 3 {
		group.Go(func() {
			for number := uint64(0); number < n; {
				changes, more := j.Since(number)
				for _, c := range changes {
					if number++; c.Number != number {
						t.Errorf("got change %d, want %d", c.Number, number)
						return
					}
				}
				if changes == nil {
					<-more
				}
			}
		})
	}
	for range n {
		j.Add(discovery.Change{Type: discovery.ChangeUpdated})
	}
	group.Wait()
}

func BenchmarkJournal(b *testing.B) {
	var j discovery.Journal
	b.ReportAllocs()
	for b.Loop() {
		j.Add(discovery.Change{Type: discovery.ChangeSeen, ID: "orders-1", Reason: "x"})
	}
}

// A metadata value that is no text costs its node nothing, and is told of.
func TestJournalTellsWhatIsLeftOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := follow(t, m.Open(), discovery.Options{})
		for _, metadata := range []string{`{"service":"orders","tags":["a"]}`, `{"service":"orders","tags":[]}`, `{"service":"orders","tags":"a"}`} {
			m.Put("a", []byte(`{"nodeId":"a","endpoint":"h:1","metadata":`+metadata+`}`))
			synctest.Wait()
			if e := d.Snapshot().Node("a"); e == nil || e.Node.Service() != "orders" {
				t.Fatalf("with metadata %s the node is %+v", metadata, e)
			}
			time.Sleep(time.Second)
		}
		got := strings.Join(journalOf(d.Journal())[1:], "\n")
		want := "seen a: metadata left out, no texts: tags\n" + `updated a: metadata left out tags → "", tags a`
		if got != want {
			t.Errorf("the journal says\n%s\nwant\n%s", got, want)
		}
	})
}
