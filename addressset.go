package caddydiscovery

import "slices"

// An addressSet is a set of dial addresses. The usual few of them cost nothing but
// their room, and many of them no more to look up than some.
type addressSet struct {
	few  [4]string
	n    int                 // of the few that are there
	many map[string]struct{} // all of them, when there are more
}

// add puts an address into the set.
func (s *addressSet) add(address string) {
	switch {
	case s.has(address):
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

// has reports whether the address is in the set.
func (s *addressSet) has(address string) bool {
	if s.many != nil {
		_, ok := s.many[address]
		return ok
	}
	return slices.Contains(s.few[:s.n], address)
}

// empty reports whether nothing is in the set. A nil set is empty.
func (s *addressSet) empty() bool { return s == nil || s.n == 0 }
