package discovery

// tasks are functions that run beside the goroutine that owns them. It receives from
// done what they return, and takes that in by take; no other goroutine touches them.
type tasks[R any] struct {
	running int
	done    chan R
}

// newTasks returns tasks of which the owner runs at most so many at once: none of them
// ever waits for it.
func newTasks[R any](most int) tasks[R] { return tasks[R]{done: make(chan R, most)} }

func (t *tasks[R]) start(task func() R) {
	t.running++
	go func() { t.done <- task() }()
}

// take calls f with a result that was received from done, and with those that are there
// by then.
func (t *tasks[R]) take(first R, f func(R)) {
	t.running--
	f(first)
	for range len(t.done) {
		t.running--
		f(<-t.done)
	}
}

// wait waits for those that are running.
func (t *tasks[R]) wait() {
	for ; t.running > 0; t.running-- {
		<-t.done
	}
}
