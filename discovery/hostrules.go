package discovery

import (
	"fmt"
	"slices"
	"strings"
)

// HostOptions say which hosts records may announce. The zero value lets them announce
// any host name, but no wildcard.
type HostOptions struct {
	// Names are the hosts that records may announce at all, in the form of [ParseHost];
	// one with a wildcard names all with one label in its place, and itself. Default: any
	// host name.
	Names []string
	// Claims keep hosts to services. Names need not name them, too.
	Claims []HostClaim
	// Sites are hosts that nobody may announce, because they are served by other means.
	// One with a wildcard is itself alone.
	Sites []string
}

// A HostClaim keeps hosts to the services that fit. All these may announce the same
// host.
type HostClaim struct {
	// Service is the name of a service, in which * stands for any characters.
	Service string
	// Hosts are in the form of [ParseHost]. One with a wildcard stands for all with one
	// label in its place that no other claim names as they are.
	Hosts []string
}

// HostRules decide which hosts a node may announce. They never change.
type HostRules struct {
	names  map[string]bool     // nil: any
	claims map[string][]string // patterns of services, by host
	sites  map[string]bool
}

// NewHostRules returns the rules that the options ask for. The error wraps [ErrInvalid]
// and says what would be accepted.
func NewHostRules(o HostOptions) (*HostRules, error) {
	r := &HostRules{claims: make(map[string][]string), sites: make(map[string]bool)}
	for _, name := range o.Names {
		host, err := wantHost(name)
		if err != nil {
			return nil, err
		}
		if r.names == nil {
			r.names = make(map[string]bool)
		}
		r.names[host] = true
	}
	for _, c := range o.Claims {
		if c.Service == "" || len(c.Hosts) == 0 {
			return nil, fmt.Errorf("%w claim: want a service, such as billing or billing*, and hosts", ErrInvalid)
		}
		for _, name := range c.Hosts {
			host, err := wantHost(name)
			if err != nil {
				return nil, err
			}
			r.claims[host] = append(r.claims[host], c.Service)
		}
	}
	for _, name := range o.Sites {
		host, err := wantHost(name)
		if err != nil {
			return nil, err
		}
		r.sites[host] = true
	}
	return r, nil
}

func wantHost(name string) (string, error) {
	host, err := ParseHost(name)
	if err != nil {
		return "", fmt.Errorf("%q: %w; want one such as shop.example.com or *.apps.example.com", Clip(name), err)
	}
	return host, nil
}

// Restrict reports whether the rules name hosts, such that not every host name may be
// announced.
func (r *HostRules) Restrict() bool { return r != nil && r.names != nil }

// Names reports whether hosts or a claim name a host, which is in normal form, and
// nothing else has it.
func (r *HostRules) Names(host string) bool {
	return r.Restrict() && !r.sites[host] && (r.named(host) || len(r.claim(host)) > 0)
}

func (r *HostRules) named(host string) bool {
	return r.names[host] || !strings.HasPrefix(host, wildcard) && r.names[wildcardOf(host)]
}

// claim returns the patterns of the services to which a host is kept, nil for none.
func (r *HostRules) claim(host string) []string {
	if services := r.claims[host]; services != nil || strings.HasPrefix(host, wildcard) {
		return services
	}
	return r.claims[wildcardOf(host)]
}

// shared reports whether all services that may announce a host have it together.
func (r *HostRules) shared(host string) bool { return r.claim(host) != nil }

// refuses returns why a service may not announce a host, which is in normal form, "" if
// it may.
func (r *HostRules) refuses(host, service string) string {
	claim := r.claim(host)
	switch {
	case r.sites[host]:
		return "it is a site of this proxy's own"
	case claim != nil && !slices.ContainsFunc(claim, func(pattern string) bool { return fits(pattern, service) }):
		return "claim keeps it to service " + Clip(strings.Join(claim, ", "))
	case claim != nil:
		return ""
	case strings.HasPrefix(host, wildcard):
		if !r.names[host] {
			return "hosts does not name this wildcard"
		}
	case r.names != nil && !r.named(host):
		return "hosts does not name it"
	}
	return ""
}

// wildcardOf returns the wildcard that stands for the host among others.
func wildcardOf(host string) string {
	_, rest, _ := strings.Cut(host, ".")
	return wildcard + rest
}

// fits reports whether a name fits a pattern in which * stands for any characters.
func fits(pattern, name string) bool {
	first, rest, found := strings.Cut(pattern, "*")
	name, ok := strings.CutPrefix(name, first)
	if !found || !ok {
		return ok && name == ""
	}
	parts := strings.Split(rest, "*")
	for _, part := range parts[:len(parts)-1] {
		_, after, ok := strings.Cut(name, part)
		if !ok {
			return false
		}
		name = after
	}
	return strings.HasSuffix(name, parts[len(parts)-1])
}
