package discovery

const (
	// ordinaryRecord is what each record may take of memory, whatever others take.
	ordinaryRecord = 4 << 10
	// maxExcess is what all records of a directory together may take beyond that.
	maxExcess = 256 << 20
	// growth is what a node in use may take beyond what there was room for, when there
	// is none: enough to say that it drains, or where it is now.
	growth = 1 << 10
)

// room bounds what the records of a directory take of memory. Their number does not:
// 100,000 of the largest take more than 6 GiB. Each may have what an ordinary record
// needs, and what goes beyond comes out of one allowance: when that is used up, it is
// large records that find no room, and never those that are as usual.
type room struct{ used int }

// excess is what a node takes beyond what each may.
func excess(n *Node) int { return max(n.footprint()-ordinaryRecord, 0) }

// take gives room to a node in place of what it had before, and returns what it has
// from now on.
func (r *room) take(had int, n *Node) int {
	has := 0
	if n != nil {
		has = excess(n)
	}
	r.used += has - had
	return has
}

// refuses returns why there is no room for a node in place of what it had before, nil
// if there is.
func (r *room) refuses(had int, n *Node) error {
	if want := excess(n); want > had && r.used-had+want > maxExcess {
		return Invalidf(FaultFull, "record: the directory is full with %d MiB of what records take beyond %d KiB each",
			maxExcess>>20, ordinaryRecord>>10)
	}
	return nil
}

// refusesGrowth returns why there is no room for what the record of a node in use says
// now, nil if there is.
func (r *room) refusesGrowth(t *tracked, n *Node) error {
	if excess(n) <= t.admitted+growth {
		return nil
	}
	return r.refuses(t.excess, n)
}

// admit gives room to a node that comes into use or changes.
func (r *room) admit(t *tracked) {
	t.excess = r.take(0, &t.entry.Node)
	if r.used <= maxExcess || t.excess < t.admitted {
		t.admitted = t.excess
	}
}
