package natskv

import (
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

func TestRemoval(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		header []string
		data   string
		want   discovery.EventType
	}{
		"put":             {nil, "{}", discovery.Put},
		"delete":          {[]string{headerOperation, "DEL"}, "", discovery.Left},
		"purge":           {[]string{headerOperation, "PURGE"}, "", discovery.Left},
		"expired":         {[]string{jetstream.MarkerReasonHeader, "MaxAge"}, "", discovery.Expired},
		"marker: purged":  {[]string{jetstream.MarkerReasonHeader, "Purge"}, "", discovery.Left},
		"marker: removed": {[]string{jetstream.MarkerReasonHeader, "Remove"}, "", discovery.Left},
		"empty":           {nil, "", discovery.Left},
		"other operation": {[]string{headerOperation, "NONE"}, "{}", discovery.Put},
	} {
		m := &message{header: make(map[string][]string), data: []byte(test.data)}
		if test.header != nil {
			m.header.Set(test.header[0], test.header[1])
		}
		if got := m.removal(); got != test.want {
			t.Errorf("%s: got %s, want %s", name, got, test.want)
		}
	}
}
