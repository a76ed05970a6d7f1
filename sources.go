package caddydiscovery

import (
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/caddy-discovery/caddy-discovery/internal/view"
)

// sources are those of all running configs, in the order in which they started.
// During a reload the old ones and the new ones are both there.
var sources struct {
	sync.Mutex
	running []*Upstreams
}

// enlist makes the source one that people can look at.
func (u *Upstreams) enlist() {
	sources.Lock()
	defer sources.Unlock()
	if !slices.Contains(sources.running, u) {
		sources.running = append(sources.running, u)
	}
}

func (u *Upstreams) delist() {
	sources.Lock()
	defer sources.Unlock()
	sources.running = slices.DeleteFunc(sources.running, func(r *Upstreams) bool { return r == u })
}

// sourcesOf returns the running sources of each directory. Those that ask for the
// same are told apart by a number.
func sourcesOf() map[*sharedDirectory][]view.Source {
	sources.Lock()
	running := slices.Clone(sources.running)
	sources.Unlock()
	byDirectory := make(map[*sharedDirectory][]view.Source)
	times := make(map[string]int)
	for _, u := range running {
		name := u.describe()
		if times[name]++; times[name] > 1 {
			name = fmt.Sprintf("%s #%d", name, times[name])
		}
		byDirectory[u.directory] = append(byDirectory[u.directory], view.Source{Name: name, Standing: u.standing})
	}
	return byDirectory
}

// describe says in a few words which nodes the source asks for.
func (u *Upstreams) describe() string {
	var parts []string
	if u.Service != "" {
		parts = append(parts, "service "+u.Service)
	}
	for _, c := range u.Where {
		parts = append(parts, "where "+c.Key+" "+strings.Join(c.Values, " "))
	}
	if u.Scheme != schemeAuto {
		parts = append(parts, "scheme "+u.Scheme)
	}
	if len(parts) == 0 {
		return "every service"
	}
	return strings.Join(parts, ", ")
}
