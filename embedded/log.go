package embedded

import (
	"fmt"
	"sync/atomic"

	"github.com/caddyserver/caddy/v2"
	"go.uber.org/zap"
)

// logger writes the server's log to Caddy's. The server outlives the
// configuration that started it, hence Caddy's default logger of the moment.
type logger struct {
	// fatal is the first fatal error before the server was up. It is kept
	// rather than logged: it becomes the error of the start.
	fatal atomic.Pointer[string]
	up    atomic.Bool
}

func zapLogger() *zap.Logger { return caddy.Log().Named("nats_server") }

// started ends the time in which fatal errors are kept.
func (l *logger) started() { l.up.Store(true) }

// firstFatal returns the first fatal error that was kept, or "".
func (l *logger) firstFatal() string {
	if s := l.fatal.Load(); s != nil {
		return *s
	}
	return ""
}

// Fatalf must not end the process: it is Caddy's.
func (l *logger) Fatalf(format string, v ...any) {
	msg := fmt.Sprintf(format, v...)
	if l.up.Load() {
		zapLogger().Error(msg)
		return
	}
	l.fatal.CompareAndSwap(nil, &msg)
}

// Noticef is what the server tells of itself while it starts and stops, some
// twenty lines; an operator of Caddy has not asked for them.
func (*logger) Noticef(format string, v ...any) { zapLogger().Debug(fmt.Sprintf(format, v...)) }
func (*logger) Warnf(format string, v ...any)   { zapLogger().Warn(fmt.Sprintf(format, v...)) }
func (*logger) Errorf(format string, v ...any)  { zapLogger().Error(fmt.Sprintf(format, v...)) }
func (*logger) Debugf(format string, v ...any)  { zapLogger().Debug(fmt.Sprintf(format, v...)) }
func (*logger) Tracef(format string, v ...any)  { zapLogger().Debug(fmt.Sprintf(format, v...)) }
