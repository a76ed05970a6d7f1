package integration

import (
	"fmt"
	"strings"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// TestReleaseOfTheWriters has all writers of a fleet change the type of a value at
// once, as a release does, under load: what can be understood is, and what cannot
// costs no request.
func TestReleaseOfTheWriters(t *testing.T) {
	onEach(t, func(t *testing.T, r registry) {
		fleet := make([]*service, 10)
		for i := range fleet {
			fleet[i] = newService(t, fmt.Sprintf("orders-%d", i))
		}
		release := func(metadata string) {
			for _, s := range fleet {
				r.put(s.id, fmt.Sprintf(`{"nodeId":%q,"endpoint":"http://%s","lastSeen":"2025-10-10T12:00:00Z","load":0,"metadata":%s,"isOnline":true}`,
					s.id, s.address, metadata))
			}
		}
		port := freeport.String(t)
		url := "http://127.0.0.1:" + port
		release(`{"service":"orders","weight":"2"}`)
		p := start(t, "", site(port, r.block("ttl 1h")+"\nservice orders", "lb_policy round_robin"))
		eventually(t, "all serve", func() bool { return fmt.Sprint(round(t, 10, url)) == all(fleet) })
		l := steady(t, url, pace)
		shown := func(what string, count int) func() bool {
			return func() bool {
				nodes, err := ask("http://" + p.admin + "/discovery/nodes")
				return err == nil && strings.Count(nodes, what) == count
			}
		}
		release(`{"service":"orders","weight":2}`)
		eventually(t, "a number is taken for a weight", shown(`"weight":"2"`, 10))
		release(`["service","orders"]`)
		eventually(t, "the records cannot be read", shown("its newest record is rejected", 10))
		eventually(t, "they are among those rejected", shown(`"state":"rejected"`, 10))
		l.mark()
		eventually(t, "the load goes on", func() bool {
			total := 0
			for _, n := range l.sinceMark() {
				total += n
			}
			return total >= 100
		})
		if served := len(l.sinceMark()); served != 10 {
			t.Errorf("%d of 10 nodes serve", served)
		}
		release(`{"service":"orders"}`)
		eventually(t, "the records can be read again", shown("rejected", 0))
		l.stop(t)
	})
}
