package caddydiscovery

import (
	"context"
	"sync"
)

// background runs a function from when it is first wanted until it is ended.
type background struct {
	once sync.Once
	stop func() // nil if it never ran
}

// start runs f in a goroutine, unless that was done, or end was called, before. The
// context of f ends with end.
func (b *background) start(f func(context.Context)) {
	b.once.Do(func() {
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		b.stop = func() { cancel(); <-done }
		go func() {
			defer close(done)
			f(ctx)
		}()
	})
}

// end ends the function and returns when it has returned.
func (b *background) end() {
	b.once.Do(func() {}) // from here on it cannot be started
	if b.stop != nil {
		b.stop()
	}
}
