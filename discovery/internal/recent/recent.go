// Package recent holds a map that forgets, for what strangers write and nobody may
// ever take back.
package recent

// A Map holds what was put last under each key, within a bound: when it is full, half
// of it is forgotten, what has not been put for longest. It is used by one goroutine.
type Map[V any] struct {
	most, mostBytes int
	size            func(V) int
	young, old      map[string]V
	bytes           int // what is young takes
}

// NewMap returns a map that holds at least most entries, of mostBytes altogether, and
// twice as much at most. An entry takes its key and what size says of its value.
func NewMap[V any](most, mostBytes int, size func(V) int) *Map[V] {
	return &Map[V]{most: most, mostBytes: mostBytes, size: size, young: make(map[string]V)}
}

// Put puts a value in place of what is there.
func (m *Map[V]) Put(key string, v V) {
	m.dropYoung(key)
	if bytes := len(key) + m.size(v); len(m.young) >= m.most || m.bytes+bytes > m.mostBytes {
		m.young, m.old, m.bytes = make(map[string]V), m.young, 0
	}
	m.young[key] = v
	m.bytes += len(key) + m.size(v)
}

// Get returns what was put under the key, unless that is forgotten.
func (m *Map[V]) Get(key string) (v V, known bool) {
	if v, known = m.young[key]; !known {
		v, known = m.old[key]
	}
	return v, known
}

// Delete forgets what was put under the key.
func (m *Map[V]) Delete(key string) {
	m.dropYoung(key)
	delete(m.old, key)
}

func (m *Map[V]) dropYoung(key string) {
	if v, known := m.young[key]; known {
		delete(m.young, key)
		m.bytes -= len(key) + m.size(v)
	}
}
