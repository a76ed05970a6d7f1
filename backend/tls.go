package backend

import (
	"fmt"

	"github.com/caddy-discovery/caddy-discovery/internal/caddyblock"
)

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
