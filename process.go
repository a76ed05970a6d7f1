package caddydiscovery

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"sync"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyevents"
	"go.uber.org/zap"
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
func processLogger(name string) *zap.Logger {
	return zap.New(processCore{}).Named(name)
}

// slogOf returns the logger as package discovery takes one. Its lines look like those
// that are logged with zap.
func slogOf(log *zap.Logger) *slog.Logger {
	return slog.New(zapslog.NewHandler(log.Core(), zapslog.WithName(log.Name()), zapslog.AddStacktraceAt(math.MaxInt)))
}

type processCore struct{ fields []zapcore.Field }

func (c processCore) Enabled(l zapcore.Level) bool { return caddy.Log().Core().Enabled(l) }

func (c processCore) With(fields []zapcore.Field) zapcore.Core {
	return processCore{append(c.fields[:len(c.fields):len(c.fields)], fields...)}
}

func (c processCore) Check(e zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return checked.AddCore(e, c)
	}
	return checked
}

func (c processCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	return caddy.Log().Core().Write(e, append(c.fields[:len(c.fields):len(c.fields)], fields...))
}

func (c processCore) Sync() error { return caddy.Log().Core().Sync() }

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
