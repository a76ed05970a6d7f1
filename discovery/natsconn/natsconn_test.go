package natsconn_test

import (
	"fmt"
	"testing"

	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
)

func TestNothingPrintsSecrets(t *testing.T) {
	t.Parallel()
	const secret = "s3cr3t-9f2c"
	for want, options := range map[string]natsconn.Options{
		"NATS credentials": {Credentials: secret},
		"NATS nkey":        {NKey: secret},
		"NATS token":       {Token: secret},
		"NATS user":        {User: secret, Password: secret},
		"no NATS login":    {Name: secret},
	} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
			if got := fmt.Sprintf(verb, options); got != want {
				t.Errorf("%s prints %q, want %q", verb, got, want)
			}
		}
	}
}
