package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

// rate is how many requests a second the demo makes.
const rate = 200

// A request that began this long after a node had left was sent by somebody who
// could have known. The allowance is for the demo, which reads of it from a pipe.
const allowance = 50 * time.Millisecond

// An account is who served how many requests.
type account struct {
	mu     sync.Mutex
	total  int
	second map[string]int       // served since the last call of turn, by node
	first  map[string]time.Time // when a node had served its first request
	last   map[string]time.Time // when the last request began that a node served
	failed int
	errs   []error // the first few
}

func newAccount() *account {
	return &account{second: map[string]int{}, first: map[string]time.Time{}, last: map[string]time.Time{}}
}

func (a *account) served(id string, began time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.total++
	a.second[id]++
	if a.first[id].IsZero() {
		a.first[id] = time.Now()
	}
	if began.After(a.last[id]) {
		a.last[id] = began
	}
}

func (a *account) failure(err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.failed++
	if len(a.errs) < 3 {
		a.errs = append(a.errs, err)
	}
}

// turn returns what was served since it was last called, and all failures.
func (a *account) turn() (second map[string]int, failed int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	second, a.second = a.second, map[string]int{}
	return second, a.failed
}

// firstServed returns when the node had served its first request, if it has.
func (a *account) firstServed(id string) (time.Time, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	t, ok := a.first[id]
	return t, ok
}

// ask makes one request and returns the node that served it.
func ask(ctx context.Context, client *http.Client, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return "", err
	}
	id := resp.Header.Get("X-Node")
	switch {
	case resp.StatusCode != http.StatusOK:
		return "", fmt.Errorf("status %s from node %q", resp.Status, id)
	case id == "":
		// A "caddy discovery register" of before, say, which goes on for ever.
		return "", errors.New("it was answered by no service of the demo; something else lists itself in its registry")
	}
	return id, nil
}

// drive makes requests, evenly spread and each on its own so that a slow one
// holds up no other, until ctx ends; it returns when all are answered.
func (a *account) drive(ctx context.Context, url string) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = rate
	client := &http.Client{Transport: transport}
	defer transport.CloseIdleConnections()

	tick := time.NewTicker(time.Second / rate)
	defer tick.Stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		wg.Go(func() {
			began := time.Now()
			id, err := ask(context.WithoutCancel(ctx), client, url)
			if err != nil {
				a.failure(err)
				return
			}
			a.served(id, began)
		})
	}
}

// settle returns how many requests were served, and what should not have
// happened: to these nodes, if the demo is complete, or at all.
func (a *account) settle(nodes []*node, complete bool) (total int, problems []error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if complete && a.total == 0 {
		problems = append(problems, errors.New("no request was served"))
	}
	if a.failed > 0 {
		problems = append(problems, fmt.Errorf("%d requests failed although a healthy node was there, the first ones: %v", a.failed, a.errs))
	}
	for _, n := range nodes {
		_, registered, leftAt := n.now()
		if complete && !registered.IsZero() && a.first[n.id].IsZero() {
			problems = append(problems, fmt.Errorf("%s joined and never served", n.id))
		}
		if late := a.last[n.id].Sub(leftAt); !leftAt.IsZero() && late > allowance {
			problems = append(problems, fmt.Errorf("%s was sent a request %v after it had left", n.id, late.Round(time.Millisecond)))
		}
	}
	return a.total, problems
}
