package embedded

import (
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
)

// FuzzProvision holds that no JSON makes the app panic when it is loaded.
func FuzzProvision(f *testing.F) {
	for _, s := range []string{
		`{}`, `null`, `{"user":null}`, `{"user":{}}`, `{"max_store":-1}`,
		`{"listen":":0"}`, `{"listen":"[::1%eth0]:4222"}`, `{"listen":"0.0.0.0:4222","user":{"name":"a","password":"b"}}`,
		`{"store":"\u0000"}`, `{"store":"{env.HOME}","max_store":1}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(_ *testing.T, raw string) {
		if strings.Contains(raw, "file.") || strings.Contains(raw, "tls") {
			return // they may name any file
		}
		var config *caddy.Config
		if err := caddy.StrictUnmarshalJSON([]byte(`{"admin":{"disabled":true},"apps":{"nats_server":`+raw+`}}`), &config); err == nil {
			_ = caddy.Validate(config)
		}
	})
}
