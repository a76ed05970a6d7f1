package caddydiscovery

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// The tests keep their lists of nodes to themselves.
	data, err := os.MkdirTemp("", "caddy-discovery-test")
	if err == nil {
		err = os.Setenv("XDG_DATA_HOME", data)
	}
	if err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m,
		goleak.Cleanup(func(code int) {
			_ = os.RemoveAll(data)
			os.Exit(code)
		}),
		// Caddy starts it once and never ends it.
		goleak.IgnoreAnyFunction("github.com/caddyserver/caddy/v2/modules/caddyhttp/reverseproxy.(*Upstream).fillDynamicHost.func1.1"),
		// The first config cleans the storage of certificates; the goroutine that
		// holds that lock finds out after seconds that it is gone.
		goleak.IgnoreAnyFunction("github.com/caddyserver/certmagic.keepLockfileFresh"),
	)
}
