package picker

import (
	"slices"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// An AddressSet is a set of dial addresses. The usual few of them cost nothing but
// their room, and many of them no more to look up than some.
type AddressSet struct {
	few  [4]string
	n    int                 // of the few that are there
	many map[string]struct{} // all of them, when there are more
}

// Add puts an address into the set.
func (s *AddressSet) Add(address string) {
	switch {
	case s.Has(address):
	case s.many != nil:
		s.many[address] = struct{}{}
	case s.n < len(s.few):
		s.few[s.n] = address
		s.n++
	default:
		s.many = map[string]struct{}{address: {}}
		for _, a := range s.few {
			s.many[a] = struct{}{}
		}
	}
}

// Has reports whether the address is in the set.
func (s *AddressSet) Has(address string) bool {
	if s.many != nil {
		_, ok := s.many[address]
		return ok
	}
	return slices.Contains(s.few[:s.n], address)
}

// hasNode reports whether one of the addresses is one at which the node is dialled.
func (s *AddressSet) hasNode(e *discovery.Entry) bool {
	return s.Has(e.Address()) || e.Named() && s.Has(e.Node.Endpoint.Address())
}

// Empty reports whether nothing is in the set. A nil set is empty.
func (s *AddressSet) Empty() bool { return s == nil || s.n == 0 }
