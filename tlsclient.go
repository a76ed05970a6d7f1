package caddydiscovery

import "fmt"

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
	if err := replaceGlobals(&t.TLSCA, &t.TLSCertificate, &t.TLSKey, &t.TLSServerName); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	return nil
}
