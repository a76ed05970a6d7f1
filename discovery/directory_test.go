package discovery_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

func TestFollowerSeesEachSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		d := discovery.NewDirectory(m.Open(), discovery.Options{})
		var numbers []uint64
		ctx, cancel := context.WithCancel(context.Background())
		var group sync.WaitGroup
		group.Go(func() {
			for {
				s := d.Snapshot()
				numbers = append(numbers, s.Number)
				select {
				case <-s.Superseded():
				case <-ctx.Done():
					return
				}
			}
		})
		synctest.Wait()
		group.Go(func() { _ = d.Run(ctx) })
		for _, id := range []string{"a", "b", "c"} {
			time.Sleep(time.Second)
			write(m, newNode(id))
		}
		synctest.Wait()
		cancel()
		group.Wait()
		if got := fmt.Sprint(numbers); got != "[0 1 2 3 4]" {
			t.Errorf("a follower saw the snapshots %s", got)
		}
	})
}

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := discoverytest.NewMemory()
		write(m, newNode("a"), newNode("b"))
		m.Break()
		start := time.Now()
		d := follow(t, m.Open(), discovery.Options{})
		s := d.Status()
		if s.Connected || s.Synced || s.Nodes != 0 || s.Restarts != 0 || !s.LastEvent.IsZero() ||
			!errors.Is(s.LastError, discovery.ErrUnreachable) || !s.Since.Equal(start) {
			t.Errorf("before the first listing: %+v", s)
		}
		m.Restore()
		reconnect(t, d)
		back := time.Now()
		s = d.Status()
		if !s.Connected || !s.Synced || s.Nodes != 2 || s.Revision != 2 || s.Restarts != 0 || s.Since.After(back) || time.Since(s.LastEvent) > time.Second {
			t.Errorf("after it: %+v", s)
		}
		time.Sleep(10 * time.Second)
		write(m, newNode("c"))
		synctest.Wait()
		s = d.Status()
		if s.Nodes != 3 || s.Revision != 3 || time.Since(s.LastEvent) != 0 {
			t.Errorf("after a join: %+v", s)
		}
		m.Break()
		synctest.Wait()
		s = d.Status()
		if s.Connected || !s.Synced || s.Nodes != 3 || s.Restarts != 1 || !errors.Is(s.LastError, discovery.ErrBroken) || time.Since(s.Since) != 0 {
			t.Errorf("after the watch broke: %+v", s)
		}
		m.Restore()
		reconnect(t, d)
		if s = d.Status(); !s.Connected || s.Restarts != 1 {
			t.Errorf("back: %+v", s)
		}
	})
}
