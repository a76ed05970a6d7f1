package caddydiscovery

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap/exp/zapslog"
	"go.uber.org/zap/zapcore"
)

// onEvent calls f once at an event of Caddy itself ("started", "stopping") of the
// config of ctx. It works in Provision only.
func onEvent(ctx caddy.Context, name string, f func()) error {
	events, err := ctx.App("events")
	if err != nil {
		return fmt.Errorf("getting the events app: %w", err)
	}
	return events.(*caddyevents.App).On(name, &eventHandler{f: f})
}

// eventHandler is a struct, not a func, because the events app encodes handlers
// into its debug log.
type eventHandler struct {
	f    func()
	once sync.Once
}

// Handle takes an event for Caddy's own only if no module is its origin: any module
// may give its events any name.
func (h *eventHandler) Handle(_ context.Context, e caddy.Event) error {
	if e.Origin() == nil {
		h.once.Do(h.f)
	}
	return nil
}

// processLogger returns a logger that writes wherever Caddy's default log goes at
// that moment. The logger of a config would be closed with its config.
func processLogger(name string) *slog.Logger {
	return slog.New(processHandler(func() slog.Handler { return handlerOf(caddy.Log().Core(), name) }))
}

// handlerOf returns a handler whose lines look like those that are logged with zap.
func handlerOf(core zapcore.Core, name string) slog.Handler {
	return zapslog.NewHandler(core, zapslog.WithName(name), zapslog.AddStacktraceAt(math.MaxInt))
}

// A processHandler is whatever handler it returns at that moment.
type processHandler func() slog.Handler

// Enabled implements slog.Handler.
func (h processHandler) Enabled(ctx context.Context, l slog.Level) bool { return h().Enabled(ctx, l) }

// Handle implements slog.Handler.
func (h processHandler) Handle(ctx context.Context, r slog.Record) error { return h().Handle(ctx, r) }

// WithAttrs implements slog.Handler.
func (h processHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return processHandler(func() slog.Handler { return h().WithAttrs(attrs) })
}

// WithGroup implements slog.Handler.
func (h processHandler) WithGroup(name string) slog.Handler {
	return processHandler(func() slog.Handler { return h().WithGroup(name) })
}

// parentOf returns the innermost module of a type among those that are being
// provisioned around the context's; nil if there is none.
func parentOf[T caddy.Module](ctx caddy.Context) (parent T) {
	for _, m := range ctx.Modules() {
		if t, ok := m.(T); ok {
			parent = t
		}
	}
	return parent
}

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
