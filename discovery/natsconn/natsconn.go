// Package natsconn holds what both NATS backends ask of whoever opens them: how
// the servers let the client in, and how it protects the connection.
package natsconn

// Options are how a client enters the servers of one cluster. At most one of
// Credentials, NKey, Token and User may be set, and none of them beside user info
// in the servers' URLs. The zero Options connect without a login. Files are read
// whenever a server is dialled, so that rotated ones are used.
type Options struct {
	// Credentials is a file with a user's JWT and seed.
	Credentials string
	// NKey is a file with a user's seed.
	NKey string
	// Token is a token that the servers know.
	Token string
	// User and Password are a user that the servers know.
	User, Password string

	// TLSCA is a file with the authorities that may sign the servers'
	// certificates. Default: those of the system.
	TLSCA string
	// TLSCert and TLSKey are files with the client's own certificate.
	TLSCert, TLSKey string
	// TLSServerName is the name that the servers' certificates must hold.
	// Default: the host of the URL.
	TLSServerName string
	// TLSHandshakeFirst secures the connection before the server has said a word,
	// as those demand that have handshake_first set. It needs TCP: nats:// or
	// tls://.
	TLSHandshakeFirst bool

	// InboxPrefix is what the subjects begin with on which answers come, of one or
	// more tokens. It is for users who may subscribe to no other. Default:
	// "_INBOX".
	InboxPrefix string

	// Name is what the servers call this client in their own logs.
	Name string
}

// String shows nothing of the options, of which some are secret.
func (Options) String() string { return "natsconn.Options{…}" }

// GoString is String, so that no way of printing shows a secret.
func (o Options) GoString() string { return o.String() }
