package discovery_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
)

// logged holds what a logger was told.
type logged struct {
	// before, where given, is called with each message, before the line counts.
	before func(message string)

	mu    sync.Mutex
	lines []line
}

type line struct {
	level   slog.Level
	message string
	fields  map[string]any
}

// newLog returns a logger for the lines at a level and above, and what it was told.
func newLog(level slog.Level) (*slog.Logger, *logged) {
	l := new(logged)
	return slog.New(logHandler{logged: l, level: level}), l
}

// all returns the lines so far, containing those whose message contains a snippet,
// warnings those at that level.
func (l *logged) all() []line {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.lines)
}

func (l *logged) containing(snippet string) []line {
	return slices.DeleteFunc(l.all(), func(l line) bool { return !strings.Contains(l.message, snippet) })
}

func (l *logged) warnings() []line {
	return slices.DeleteFunc(l.all(), func(l line) bool { return l.level != slog.LevelWarn })
}

type logHandler struct {
	*logged
	level slog.Level
	attrs []slog.Attr
}

func (h logHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }

func (h logHandler) Handle(_ context.Context, r slog.Record) error {
	if h.before != nil {
		h.before(r.Message)
	}
	l := line{level: r.Level, message: r.Message, fields: make(map[string]any)}
	add := func(a slog.Attr) bool {
		v := a.Value.Any()
		if err, ok := v.(error); ok {
			v = err.Error()
		}
		l.fields[a.Key] = v
		return true
	}
	for _, a := range h.attrs {
		add(a)
	}
	r.Attrs(add)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines = append(h.lines, l)
	return nil
}

func (h logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	h.attrs = slices.Concat(h.attrs, attrs)
	return h
}

func (h logHandler) WithGroup(name string) slog.Handler {
	panic(fmt.Sprintf("a group %q: the lines of this package have none", name))
}
