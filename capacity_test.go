package caddydiscovery

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestFullNodesAreNoCandidates has a node that takes one request at a time beside one
// that names no capacity: while it is busy each request goes to the other.
func TestFullNodesAreNoCandidates(t *testing.T) {
	for _, test := range []struct{ options, rest string }{
		{"", ""},
		{"", "lb_policy random_choose 2"},
		{"", "lb_policy round_robin"},
		{"", "lb_policy least_conn"},
		{"", "lb_policy least_load"},
		{"", "lb_policy first"},
		{"", "lb_policy uri_hash"},
		{"", "lb_policy cookie lb secret"},
		{"", "fail_duration 1m\nunhealthy_request_count 5"},
		{"pick 1", ""},
		{"pick 2", "lb_policy least_conn"},
		{"pick 1 hash {path}", "lb_policy first"},
		{"subset 1\nproxy_id p", ""},
		{"subset 1\nproxy_id q", "lb_policy round_robin"},
		{"prefer zone eu", ""},
		{"prefer zone eu\npick 1", "lb_policy first"},
	} {
		t.Run(strings.NewReplacer("{", "", "}", "", "\n", " ").Replace(test.options+" "+test.rest), func(t *testing.T) {
			name, m := newMemory(t)
			entered, release := make(chan struct{}), make(chan struct{})
			list(t, m, "a", troubledService(t, "a", entered, release), "capacity", "1", "zone", "eu")
			free := sync.OnceFunc(func() { close(release) })
			t.Cleanup(free)
			url := serveNodes(t, name, test.options, test.rest)
			var slow sync.WaitGroup
			slow.Go(func() {
				if status, body := get(t, url+"/slow"); status != http.StatusOK || body != "a" {
					t.Errorf("status %d, %q of the request that fills the node", status, body)
				}
			})
			<-entered
			if status, _ := get(t, url); status != http.StatusServiceUnavailable {
				t.Errorf("status %d, want 503 while the only node is full", status)
			}
			reason, _ := runningSource(t).standing(runningSource(t).directory.Snapshot().Node("a"))
			if reason != "full: 1 requests in flight, capacity 1" {
				t.Errorf("the admin API would say %q", reason)
			}
			list(t, m, "b", service(t, "b").URL, "zone", "us")
			eventually(t, "the other serves", func() bool { _, body := get(t, url); return body == "b" })
			for range 30 {
				if status, body := get(t, url); body != "b" {
					t.Fatalf("status %d, %q, want the node that has room", status, body)
				}
			}
			free()
			slow.Wait()
			if status, _ := get(t, url); status != http.StatusOK {
				t.Errorf("status %d afterwards", status)
			}
		})
	}
}

// TestARequestThatTakesTheLastPlaceCostsOthersNothing has a node become full between what a
// request gets of the source and the choice of the policy.
func TestARequestThatTakesTheLastPlaceCostsOthersNothing(t *testing.T) {
	for _, name := range []string{"random", "random_choose", "round_robin", "least_conn", "least_load", "least_latency", "first", "ip_hash", "uri_hash", "cookie"} {
		t.Run(name, func(t *testing.T) {
			registry, m := newMemory(t)
			for i := range 5 {
				id := fmt.Sprint("capacity-", name, i)
				list(t, m, id, "http://"+at(id), "capacity", "1")
			}
			u := source(t, "registry memory "+registry, "load_balancing", policy(name))
			r := request()
			pool, err := u.GetUpstreams(r)
			if err != nil || len(pool) == 0 {
				t.Fatalf("got %d upstreams: %v", len(pool), err)
			}
			host(pool)
			busy(pool[0].Dial, 1)
			if up := u.handler.LoadBalancing.SelectionPolicy.Select(pool, r, httptest.NewRecorder()); up == nil || up == pool[0] {
				t.Errorf("the request got %+v", up)
			}
		})
	}
}

// TestRequestsWaitForRoom has a full node and lb_try_duration: a request waits.
func TestRequestsWaitForRoom(t *testing.T) {
	name, m := newMemory(t)
	entered, release := make(chan struct{}), make(chan struct{})
	list(t, m, "a", troubledService(t, "a", entered, release), "capacity", "1")
	url := serveNodes(t, name, "", "lb_try_duration 20s\nlb_try_interval 1ms")
	var waiting sync.WaitGroup
	waiting.Go(func() { get(t, url+"/slow") })
	<-entered
	waiting.Go(func() {
		if status, body := get(t, url); status != http.StatusOK || body != "a" {
			t.Errorf("status %d, %q of the request that waited", status, body)
		}
	})
	time.AfterFunc(10*time.Millisecond, func() { close(release) })
	waiting.Wait()
}

// TestCapacityAndTheLimitOfTheHandler holds that the smaller of two limits counts.
func TestCapacityAndTheLimitOfTheHandler(t *testing.T) {
	for _, test := range []struct{ capacity, rest string }{
		{"2", ""}, {"2", "unhealthy_request_count 5"}, {"5", "unhealthy_request_count 2"}, {"2.9", ""},
	} {
		t.Run(test.capacity+" "+test.rest, func(t *testing.T) {
			name, m := newMemory(t)
			entered, release := make(chan struct{}), make(chan struct{})
			list(t, m, "a", troubledService(t, "a", entered, release), "capacity", test.capacity)
			url := serveNodes(t, name, "", test.rest)
			var slow sync.WaitGroup
			for range 2 {
				slow.Go(func() { get(t, url+"/slow") })
				<-entered
			}
			if status, _ := get(t, url); status != http.StatusServiceUnavailable {
				t.Errorf("status %d of a third request, want 503", status)
			}
			close(release)
			slow.Wait()
		})
	}
}
