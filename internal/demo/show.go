package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// A show is the fleet, the traffic and what happens to them.
type show struct {
	screen  *screen
	proxy   *proxy
	edge    *edge
	fleet   *fleet
	account *account
}

func newShow(s *screen, p *proxy, e *edge) *show {
	return &show{screen: s, proxy: p, edge: e, fleet: &fleet{registry: p.registry}, account: newAccount()}
}

// run shows everything, then stays until ctx ends, or until duration has passed
// since began if it is not 0. It returns what went wrong.
func (s *show) run(ctx context.Context, gap time.Duration, began time.Time, duration time.Duration) error {
	for _, id := range []string{"orders-1", "orders-2"} {
		if _, err := s.fleet.add(id); err != nil {
			return err
		}
	}
	if err := s.settle(ctx); err != nil {
		return unlessInterrupted(ctx, err)
	}
	s.screen.event(good, "orders-1 and orders-2 are up; from now on %d requests a second", rate)

	running, stop := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer stop()
		select {
		case <-s.proxy.ended:
		case <-running.Done():
		}
	})
	wg.Go(func() { s.account.drive(running, s.proxy.url) })
	staying := make(chan struct{})
	wg.Go(func() { s.report(running, staying) })

	err := s.tour(running, gap)
	if err == nil && running.Err() == nil {
		if duration > 0 {
			pause(running, time.Until(began.Add(duration)))
		} else {
			close(staying)
			s.screen.event(quiet, "that was all; the fleet stays up until you press Ctrl-C: curl -i %s", s.proxy.url)
			<-running.Done()
		}
	}
	stop()
	wg.Wait()
	select {
	case <-s.proxy.ended:
		err = errors.New("the proxy ended in the middle of it")
	default:
	}
	if ctx.Err() != nil {
		s.screen.say("")
		s.screen.event(quiet, "interrupted: the fleet leaves, Caddy stops")
	}
	if err = unlessInterrupted(ctx, err); err != nil {
		return err
	}
	return s.verdict(ctx.Err() == nil)
}

// settle waits until Caddy serves from both of the first nodes.
func (s *show) settle(ctx context.Context) error {
	for _, n := range s.fleet.all() {
		if err := n.await(ctx, up); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	seen := make(map[string]bool)
	var last error
	err := until(ctx, func() bool {
		var id string
		if id, last = ask(ctx, http.DefaultClient, s.proxy.url); last == nil {
			seen[id] = true
		}
		return len(seen) == 2
	})
	if err != nil {
		return fmt.Errorf("only %d of the first 2 nodes are served: %w", len(seen), errors.Join(last, err))
	}
	return nil
}

// tour makes things happen to the fleet.
func (s *show) tour(ctx context.Context, gap time.Duration) error {
	pause(ctx, gap)
	if err := s.join(ctx, "orders-3"); err != nil {
		return err
	}

	pause(ctx, gap)
	leaver := s.fleet.all()[0]
	s.screen.event(warning, "%s is told to stop: it says that it drains, waits %v and leaves", leaver.id, drain)
	end(leaver.cmd.Process, leaver.ended, 10*time.Second)
	if err := leaver.await(ctx, left); err != nil {
		return err
	}
	s.screen.event(quiet, "%s has left, its process has ended", leaver.id)

	pause(ctx, gap)
	victim := s.fleet.all()[1]
	if ctx.Err() != nil {
		return ctx.Err()
	}
	victim.become(crashed)
	if err := victim.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("killing %s: %w", victim.id, err)
	}
	<-victim.ended
	killed := time.Now()
	s.screen.event(bad, "%s crashes (kill -9) and tells nobody: until its lease of %v has run out, requests for it go to another node", victim.id, lease)
	if err := s.join(ctx, "orders-4"); err != nil {
		return err
	}
	if err := s.lapse(ctx, victim, killed); err != nil {
		return err
	}

	pause(ctx, gap/2)
	return s.hosts(ctx)
}

// join starts a node and tells how soon it serves.
func (s *show) join(ctx context.Context, id string) error {
	n, err := s.fleet.add(id)
	if err != nil {
		return err
	}
	if err := n.await(ctx, up); err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := until(wait, func() bool { _, ok := s.account.firstServed(id); return ok }); err != nil {
		return fmt.Errorf("%s joined and serves nothing: %w", id, err)
	}
	first, _ := s.account.firstServed(id)
	_, registered, _ := n.now()
	s.screen.event(good, "%s joins, and has served its first request %v later", id, max(0, first.Sub(registered)).Round(time.Millisecond))
	return nil
}

// lapse waits until Caddy has taken the crashed node off its list.
func (s *show) lapse(ctx context.Context, n *node, killed time.Time) error {
	wait, cancel := context.WithTimeout(ctx, 4*lease)
	defer cancel()
	var err error
	e := until(wait, func() bool {
		var listed bool
		listed, err = s.proxy.lists(wait, n.id)
		return errors.Is(err, errNoAdmin) || err == nil && !listed
	})
	switch {
	case errors.Is(err, errNoAdmin):
		pause(ctx, time.Until(killed.Add(lease)))
		s.screen.event(quiet, "the lease of %s has run out", n.id)
		return nil
	case e != nil:
		return fmt.Errorf("%s crashed and Caddy still lists it: %w", n.id, errors.Join(err, e))
	}
	s.screen.event(quiet, "%s is off the list, %.1f s after its crash", n.id, time.Since(killed).Seconds())
	return nil
}

// report prints the account of every second until ctx ends, more calmly once
// nothing is going to happen any more.
func (s *show) report(ctx context.Context, staying <-chan struct{}) {
	began := time.Now()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		calm := false
		select {
		case <-staying:
			calm = true
		default:
		}
		second, failed := s.account.turn()
		s.screen.second(time.Since(began), s.fleet.all(), second, failed, calm)
	}
}

// verdict prints how it went and returns what should not have happened. Who was
// interrupted cannot be blamed for what is missing.
func (s *show) verdict(complete bool) error {
	total, problems := s.account.settle(s.fleet.all(), complete)
	if len(problems) > 0 {
		return errors.Join(problems...)
	}
	s.screen.event(good, "%d requests, none failed", total)
	return nil
}

// unlessInterrupted returns err, or nil if it comes of the user's interrupt.
func unlessInterrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// pause waits, at most until ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
