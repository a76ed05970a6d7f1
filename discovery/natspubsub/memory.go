package natspubsub

// A memory holds what was noted last about each id, for at least as many ids as
// its limit and at most for twice as many: what has not been noted for longest
// is forgotten, half of it at a time. It is used by one goroutine.
type memory[V any] struct {
	limit      int
	young, old map[string]V
}

func newMemory[V any](limit int) *memory[V] {
	return &memory[V]{limit: limit, young: make(map[string]V)}
}

func (m *memory[V]) note(id string, v V) {
	if _, known := m.young[id]; !known && len(m.young) >= m.limit {
		m.young, m.old = make(map[string]V), m.young
	}
	m.young[id] = v
}

func (m *memory[V]) recall(id string) (v V, known bool) {
	if v, known = m.young[id]; !known {
		v, known = m.old[id]
	}
	return v, known
}

func (m *memory[V]) forget(id string) {
	delete(m.young, id)
	delete(m.old, id)
}
