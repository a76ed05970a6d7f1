package caddydiscovery

import (
	"fmt"

	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
)

// NATSConnection is how to reach and enter a NATS server. At most one of
// credentials, nkey, token and user may be given. Placeholders such as {env.X}
// and {file.…} are expanded in every field.
type NATSConnection struct {
	// The servers' URLs (nats:// or tls://), of one cluster. Default:
	// nats://127.0.0.1:4222
	URLs []string `json:"urls,omitempty"`

	// A credentials file, as nsc writes it.
	Credentials string `json:"credentials,omitempty"`

	// A file with the seed of an NKey.
	NKey string `json:"nkey,omitempty"`

	// A token.
	Token string `json:"token,omitempty"`

	// A user's name.
	User string `json:"user,omitempty"`

	// The user's password.
	Password string `json:"password,omitempty"`

	TLSClient
}

func (c *NATSConnection) provision() error {
	for i := range c.URLs {
		if err := replaceGlobals(&c.URLs[i]); err != nil {
			return fmt.Errorf("URL: %w", err)
		}
	}
	if err := replaceGlobals(&c.Credentials, &c.NKey, &c.Token, &c.User, &c.Password); err != nil {
		return fmt.Errorf("credentials: %w", err)
	}
	return c.TLSClient.provision()
}

func (c *NATSConnection) config() natsconn.Config {
	return natsconn.Config{
		URLs:          c.URLs,
		Credentials:   c.Credentials,
		NKey:          c.NKey,
		Token:         c.Token,
		User:          c.User,
		Password:      c.Password,
		TLSCA:         c.TLSCA,
		TLSCert:       c.TLSCertificate,
		TLSKey:        c.TLSKey,
		TLSServerName: c.TLSServerName,
		Name:          "caddy-discovery",
	}
}
