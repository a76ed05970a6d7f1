// Package tlsfiles makes TLS configurations of the files that secure a
// connection to a registry. It is for every backend, and knows none.
package tlsfiles

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// Files are what the options tls_ca, tls_client_auth and tls_server_name name.
// The zero value trusts the system's authorities and shows no certificate.
type Files struct {
	// CA is a file with the authorities that may sign the servers' certificates,
	// in PEM. Default: those of the system.
	CA string
	// Cert and Key are files with the client's certificate and its key, in PEM.
	Cert, Key string
	// ServerName is the name that the servers' certificates must hold. Default:
	// the host that is dialled.
	ServerName string
}

// Given reports whether anything is named, which asks for TLS by itself.
func (f Files) Given() bool { return f != Files{} }

// Validate reports, as an error that wraps [discovery.ErrInvalid], whether the
// options contradict each other. It opens no file.
func (f Files) Validate() error {
	if (f.Cert == "") != (f.Key == "") {
		return fmt.Errorf("%w tls_client_auth: a client's certificate and its key go together, only one is given", discovery.ErrInvalid)
	}
	return nil
}

// Config reads the files and returns the configuration of one connection to a
// host. It is called anew for each connection: files are replaced on disk while
// the process runs, by another certificate or by another authority, and nobody
// tells of it. What is wrong with a file is an error that wraps
// [discovery.ErrInvalid] and names the option, the file and nothing that is in it.
func (f Files) Config(host string) (*tls.Config, error) {
	if err := f.Validate(); err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: cmp.Or(f.ServerName, host)}
	if f.CA != "" {
		pem, err := os.ReadFile(f.CA)
		if err != nil {
			return nil, fmt.Errorf("%w tls_ca: %w", discovery.ErrInvalid, err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%w tls_ca: %s holds no certificate in PEM", discovery.ErrInvalid, f.CA)
		}
	}
	if f.Cert != "" {
		pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
		var path *os.PathError
		switch {
		case errors.As(err, &path):
			return nil, fmt.Errorf("%w tls_client_auth: %w", discovery.ErrInvalid, err)
		case err != nil:
			return nil, fmt.Errorf("%w tls_client_auth: certificate %s with key %s: %w", discovery.ErrInvalid, f.Cert, f.Key, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}
