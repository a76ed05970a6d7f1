package discovery_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestParseOverride(t *testing.T) {
	until := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for data, want := range map[string]discovery.Override{
		`{}`:                   {},
		`{"state":"draining"}`: {State: discovery.StateDraining},
		`{"State":"Maintenance","Weight":0.5,"Until":"2026-01-02T03:04:05Z"}`: {State: discovery.StateMaintenance, Weight: new(0.5), Until: until},
		`{"weight":0,"by":"ann"}`: {Weight: new(0.0)},
	} {
		o, err := discovery.ParseOverride([]byte(data))
		if err != nil || o.String() != want.String() || !o.Until.Equal(want.Until) {
			t.Errorf("%s is %v, %v, want %v", data, o, err, want)
			continue
		}
		again, err := discovery.AppendOverride(nil, o)
		if err != nil {
			t.Errorf("writing %v: %v", o, err)
		} else if back, err := discovery.ParseOverride(again); err != nil || back.String() != o.String() {
			t.Errorf("%v came back as %v, %v", o, back, err)
		}
	}
	for _, data := range []string{
		"", "null", "[]", `"up"`, `{"state":"gone"}`, `{"weight":-1}`, `{"weight":1e99}`, `{"until":"tomorrow"}`,
		`{"state":"` + strings.Repeat("x", 5000) + `"}`,
	} {
		if o, err := discovery.ParseOverride([]byte(data)); !errors.Is(err, discovery.ErrInvalid) {
			t.Errorf("%.40q is %v, %v, want an error that wraps ErrInvalid", data, o, err)
		}
	}
}
