package discovery

import (
	"fmt"
	"slices"
	"strings"
)

// Limits of what one record may announce.
const (
	// MaxHosts is how many hosts are read of a record.
	MaxHosts = 100
	// MaxPaths is how many paths are read of a record.
	MaxPaths = 20
	// maxHostText is how much of each list is read, in bytes: a hundred names of usual
	// length take a third of it.
	maxHostText = 8 << 10
	// maxRefused is how much is remembered of what a record does not get.
	maxRefused = 20
)

// A hostStatement is what a record says of hosts, whoever may have them.
type hostStatement struct {
	hosts   []statedHost
	paths   []string // without what stands for all below; one is "" for all paths
	refused []RefusedHost
}

// A statedHost is a host in normal form, and as the record has it.
type statedHost struct{ name, text string }

// readHosts reads the hosts and paths of a record. What cannot be read is refused and
// costs nothing else of it.
func readHosts(n *Node) *hostStatement {
	s := new(hostStatement)
	hosts, paths := n.Metadata[KeyHosts], n.Metadata[KeyPaths]
	if hosts == "" {
		return s
	}
	s.read("hosts", hosts, MaxHosts, func(word string) error {
		name, err := parseHost(word)
		if err == nil && !slices.ContainsFunc(s.hosts, func(h statedHost) bool { return h.name == name }) {
			s.hosts = append(s.hosts, statedHost{name, word})
		}
		return err
	})
	if strings.Trim(paths, listSeparators) == "" {
		s.paths = []string{""}
		return s
	}
	s.read("paths", paths, MaxPaths, func(word string) error {
		prefix, err := parsePath(word)
		if err == nil && !slices.Contains(s.paths, prefix) {
			s.paths = append(s.paths, prefix)
		}
		return err
	})
	return s
}

const listSeparators = " ,\t"

// read reads the words of a list, which are at most so many.
func (s *hostStatement) read(what, list string, most int, add func(word string) error) {
	words := 0
	for at := 0; at < len(list); {
		word := list[at:]
		if i := strings.IndexAny(word, listSeparators); i >= 0 {
			word = word[:i]
		}
		from := at
		at += len(word) + 1
		if word == "" {
			continue
		}
		if words++; words > most || from+len(word) > maxHostText {
			s.refuse(word, fmt.Sprintf("it and what follows is left out, %s are at most %d in %d KiB", what, most, maxHostText>>10))
			return
		}
		if err := add(word); err != nil {
			s.refuse(word, err.Error())
		}
	}
}

func (s *hostStatement) refuse(word, reason string) {
	if len(s.refused) < maxRefused {
		s.refused = append(s.refused, RefusedHost{visible(word), reason})
	}
}

// allowed returns the hosts that the rules let a service announce, and what was refused.
func (s *hostStatement) allowed(rules *HostRules, service string) (hosts []string, refused []RefusedHost) {
	refused = slices.Clip(s.refused)
	for _, h := range s.hosts {
		reason := rules.refuses(h.name, service)
		switch {
		case reason == "":
			hosts = append(hosts, h.name)
		case len(refused) < maxRefused:
			refused = append(refused, RefusedHost{s.written(h.name), reason})
		}
	}
	return hosts, refused
}

// written returns how the record has a host, with its ASCII form where that looks other:
// two names that look alike differ there.
func (s *hostStatement) written(name string) string {
	for _, h := range s.hosts {
		switch {
		case h.name != name:
		case isASCII(h.text):
			return visible(h.text)
		default:
			return visible(h.text) + " (" + name + ")"
		}
	}
	return name
}

// shownPaths returns the paths as they are shown.
func (s *hostStatement) shownPaths() (paths []string) {
	for _, prefix := range s.paths {
		paths = append(paths, prefix+AllPaths)
	}
	return paths
}
