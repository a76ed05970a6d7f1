package natskv

import "sync"

// progress is how far a watch has got. The watch moves it on, and whoever verifies the
// watch waits for that. It may be used concurrently.
type progress struct {
	mu    sync.Mutex
	at    position
	moved chan struct{} // closed at the next move, if somebody waits
}

// A position is how far a watch has got at one moment.
type position struct {
	synced bool // the listing is over
	busy   bool // something is being emitted
	// reached is the stream sequence up to which everything was emitted, which
	// means something once the watch is synced; number is that of the last
	// message emitted.
	reached, number uint64
}

// now returns the position, and a channel that is closed when the watch gets further.
func (p *progress) now() (at position, moved <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.moved == nil {
		p.moved = make(chan struct{})
	}
	return p.at, p.moved
}

// emitting notes that emit is called, or has returned.
func (p *progress) emitting(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at.busy = on
}

// advance notes that a message was emitted.
func (p *progress) advance(m *message) {
	p.move(m.sequence, func(at *position) { at.busy, at.number = false, m.number })
}

// sync notes that everything up to a stream sequence was emitted, and the listing is
// over.
func (p *progress) sync(reached uint64) {
	p.move(reached, func(at *position) { at.synced = true })
}

func (p *progress) move(reached uint64, change func(*position)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.at)
	p.at.reached = max(p.at.reached, reached)
	if p.moved != nil {
		close(p.moved)
		p.moved = nil
	}
}
