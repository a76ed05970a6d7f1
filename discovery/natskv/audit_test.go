package natskv

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

// begun returns a watch whose feed is open and that nobody reads.
func begun(t *testing.T, s *natstest.Server) (w *watch, failed context.Context) {
	t.Helper()
	r, err := Open(Config{URLs: []string{s.URL()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	w, err = r.begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.feed.close(t.Context()) })
	failed, w.fail = context.WithCancelCause(t.Context())
	t.Cleanup(func() { w.fail(nil) })
	w.progress.sync(w.info.State.LastSeq)
	return w, failed
}

// On one server nothing of this happens without the consumer being lost too; in
// a cluster it does.
func TestCompare(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	for name, test := range map[string]struct {
		change func(w *watch)
		want   string
	}{
		"nothing":   {func(*watch) {}, ""},
		"recreated": {func(w *watch) { w.info.Created = w.info.Created.Add(time.Second) }, "recreated"},
		"went back": {func(w *watch) { w.progress.sync(1000) }, "went back from revision 1000"},
		"emptied":   {func(w *watch) { w.info.State.LastSeq = 1000 }, "went back from revision 1000"},
		"deleted":   {func(w *watch) { w.info.Config.Name = "KV_none" }, "deleted"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, failed := begun(t, s)
			test.change(w)
			err := w.compare(t.Context())
			if test.want == "" {
				if err != nil || failed.Err() != nil {
					t.Errorf("compare: %v, failed: %v", err, context.Cause(failed))
				}
				return
			}
			if !errors.Is(err, discovery.ErrBroken) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("compare: %v, want %q", err, test.want)
			}
			if context.Cause(failed) != err {
				t.Errorf("the watch failed with %v, want %v", context.Cause(failed), err)
			}
		})
	}
}

// What was written does not come, and no heartbeat is missing.
func TestAudit(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(t *testing.T, s *natstest.Server, w *watch){
		"stuck": func(t *testing.T, s *natstest.Server, _ *watch) {
			if _, err := s.KeyValue(DefaultBucket).PutString(t.Context(), "node.a", "{}"); err != nil {
				t.Fatal(err)
			}
		},
		"went back": func(_ *testing.T, _ *natstest.Server, w *watch) { w.progress.sync(1000) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := natstest.Start(t)
			w, failed := begun(t, s)
			change(t, s, w)
			w.audit(failed)
			if err := context.Cause(failed); !errors.Is(err, discovery.ErrBroken) {
				t.Errorf("the audit ended with %v", err)
			}
		})
	}
}
