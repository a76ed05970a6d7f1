package natsconn_test

import (
	"fmt"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
)

func TestNothingPrintsSecrets(t *testing.T) {
	t.Parallel()
	const secret = "s3cr3t-9f2c"
	options := natsconn.Options{Credentials: secret, NKey: secret, Token: secret, User: secret, Password: secret}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
		if got := fmt.Sprintf(verb, options); got != "natsconn.Options{…}" {
			t.Errorf("%s prints %q", verb, got)
		}
	}
}
