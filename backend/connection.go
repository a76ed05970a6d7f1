package backend

import (
	"fmt"
	"slices"
	"strings"

	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
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

	// What the subjects begin with on which answers come, for a user who may
	// subscribe to no other: _INBOX_proxy where he may subscribe to
	// "_INBOX_proxy.>". Default: _INBOX
	InboxPrefix string `json:"inbox_prefix,omitempty"`

	TLSClient

	// Whether to secure the connection before the server says a word. Servers with
	// handshake_first set demand it, and no others take it. Default: false
	TLSHandshakeFirst bool `json:"tls_handshake_first,omitempty"`
}

func (c *NATSConnection) provision() error {
	if err := replaceURLs(c.URLs); err != nil {
		return err
	}
	if err := ReplaceGlobals(&c.Credentials, &c.NKey, &c.Token, &c.User, &c.Password); err != nil {
		return fmt.Errorf("credentials: %w", err)
	}
	if err := ReplaceGlobals(&c.InboxPrefix); err != nil {
		return fmt.Errorf("inbox_prefix: %w", err)
	}
	return c.TLSClient.provision()
}

// HasLogin reports whether the server is told who connects.
func (c *NATSConnection) HasLogin() bool {
	return c.Credentials != "" || c.NKey != "" || c.Token != "" || c.User != "" || c.TLSCertificate != "" || hasUser(c.URLs)
}

func replaceURLs(urls []string) error {
	for i := range urls {
		if err := ReplaceGlobals(&urls[i]); err != nil {
			return fmt.Errorf("URL: %w", err)
		}
	}
	return nil
}

// hasUser reports whether one of the URLs of a registry names a user.
func hasUser(urls []string) bool {
	return slices.ContainsFunc(urls, func(url string) bool { return strings.Contains(url, "@") })
}

func (c *NATSConnection) grammar() caddyblock.Options {
	return caddyblock.Options{
		"credentials":         caddyblock.Text("<file>", &c.Credentials),
		"nkey":                caddyblock.Text("<seed-file>", &c.NKey),
		"token":               caddyblock.Text("<token>", &c.Token),
		"user":                caddyblock.Texts("<name> <password>", &c.User, &c.Password),
		"inbox_prefix":        caddyblock.Text("<prefix>", &c.InboxPrefix),
		"tls_handshake_first": caddyblock.Switch(&c.TLSHandshakeFirst),
	}.With(c.TLSClient.grammar())
}

func (c *NATSConnection) conn() natsconn.Options {
	return natsconn.Options{
		Credentials:       c.Credentials,
		NKey:              c.NKey,
		Token:             c.Token,
		User:              c.User,
		Password:          c.Password,
		InboxPrefix:       c.InboxPrefix,
		TLSCA:             c.TLSCA,
		TLSCert:           c.TLSCertificate,
		TLSKey:            c.TLSKey,
		TLSServerName:     c.TLSServerName,
		TLSHandshakeFirst: c.TLSHandshakeFirst,
		Name:              "caddy-discovery",
	}
}

// TLSClient is how a connection to a registry is secured. Placeholders are
// expanded in every field.
type TLSClient struct {
	// A PEM file with the certificate authorities that the server's certificate
	// may come from. Default: the system's
	TLSCA string `json:"tls_ca,omitempty"`

	// A PEM file with the certificate that Caddy shows to the server. Needs
	// tls_key.
	TLSCertificate string `json:"tls_certificate,omitempty"`

	// A PEM file with the key to that certificate.
	TLSKey string `json:"tls_key,omitempty"`

	// The name that the server's certificate must be for. Default: the URL's host
	TLSServerName string `json:"tls_server_name,omitempty"`
}

func (t *TLSClient) provision() error {
	if err := ReplaceGlobals(&t.TLSCA, &t.TLSCertificate, &t.TLSKey, &t.TLSServerName); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	return nil
}

func (t *TLSClient) grammar() caddyblock.Options {
	return caddyblock.Options{
		"tls_ca":          caddyblock.Text("<file>", &t.TLSCA),
		"tls_client_auth": caddyblock.Texts("<certificate> <key>", &t.TLSCertificate, &t.TLSKey),
		"tls_server_name": caddyblock.Text("<name>", &t.TLSServerName),
	}
}
