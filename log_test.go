package caddydiscovery

import (
	"bytes"
	"errors"
	"log/slog"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// A line of package discovery is written like one of Caddy's own.
func TestLinesOfTheCoreLookLikeCaddys(t *testing.T) {
	var out bytes.Buffer
	encoder := zapcore.EncoderConfig{
		LevelKey: "level", NameKey: "logger", MessageKey: "msg", CallerKey: "caller", StacktraceKey: "stack", LineEnding: "\n",
		EncodeLevel: zapcore.LowercaseLevelEncoder, EncodeDuration: zapcore.SecondsDurationEncoder,
	}
	log := zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(encoder), zapcore.AddSync(&out), zapcore.InfoLevel)).Named("discovery")
	log = log.With(zap.String("registry", "nats://a"))
	core := func(log *zap.Logger) *slog.Logger { return slog.New(handlerOf(log.Core(), log.Name())) }
	err := errors.Join(errors.New("one"), errors.New("two"))

	log.Warn("lost", zap.Int("nodes", 3), zap.Duration("away", 1500*time.Millisecond), zap.Error(err),
		zap.Float64("load", 0.5), zap.Bool("known", true), zap.Strings("writers", []string{"a", "b"}))
	want := out.String()
	out.Reset()
	core(log).Warn("lost", "nodes", 3, "away", 1500*time.Millisecond, "error", err,
		"load", 0.5, "known", true, "writers", []string{"a", "b"})
	if got := out.String(); got != want {
		t.Errorf("got  %swant %s", got, want)
	}

	out.Reset()
	log.Info("listed", zap.String("changes_by", "stream"))
	log.Error("broken")
	want = out.String()
	out.Reset()
	core(log).With("changes_by", "stream").Info("listed")
	core(log).Error("broken")
	if got := out.String(); got != want {
		t.Errorf("got  %swant %s", got, want)
	}

	out.Reset()
	if core(log).Debug("quiet"); out.Len() != 0 || core(log).Enabled(t.Context(), slog.LevelDebug) {
		t.Errorf("below the level: %q", out.String())
	}
}

// TestProcessLogOutlivesConfigs holds that a logger writes to what is the default log
// at that moment, with what was added to it before.
func TestProcessLogOutlivesConfigs(t *testing.T) {
	var first, second bytes.Buffer
	plain := &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}}
	var current slog.Handler = slog.NewTextHandler(&first, plain)
	log := slog.New(processHandler(func() slog.Handler { return current })).With("registry", "r").WithGroup("g")
	log.Info("one", "n", 1)
	current = slog.NewTextHandler(&second, plain)
	log.Info("two", "n", 2)
	log.Debug("quiet")
	if want := "level=INFO msg=one registry=r g.n=1\n"; first.String() != want {
		t.Errorf("the first log has %q, want %q", first.String(), want)
	}
	if want := "level=INFO msg=two registry=r g.n=2\n"; second.String() != want {
		t.Errorf("the second log has %q, want %q", second.String(), want)
	}
}
