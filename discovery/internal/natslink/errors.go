package natslink

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"

	"github.com/nats-io/nats.go"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// describe says what went wrong with a connection and what would help. Its
// text holds nothing that was secret.
func describe(err error) (text string, kind error) {
	var (
		authority   x509.UnknownAuthorityError
		hostname    x509.HostnameError
		certificate *tls.CertificateVerificationError
		remote      *net.OpError
		dns         *net.DNSError
	)
	kind = discovery.ErrUnreachable
	switch {
	case errors.Is(err, errServerWaits):
		return "it accepts the connection and does not answer; if it waits for the TLS handshake (handshake_first), set tls_handshake_first on", kind
	case errors.Is(err, errServerSpeaks):
		return "it does not begin with the TLS handshake; set tls_handshake_first off", kind
	case isAuth(err):
		return authText(err), discovery.ErrCredentials
	case errors.As(err, &authority):
		return "the server's certificate is signed by an unknown authority; name it with tls_ca", kind
	case errors.As(err, &hostname):
		return fmt.Sprintf("the server's certificate is for another name (%v); name it with tls_server_name", hostname), kind
	case errors.As(err, &certificate):
		return fmt.Sprintf("the server's certificate is not valid: %v", certificate.Err), kind
	case errors.As(err, &remote) && remote.Op == "remote error", errors.Is(err, nats.ErrTLS) && isClosed(err):
		// In TLS 1.3 a server refuses a client's certificate after the client
		// took the handshake for done.
		return fmt.Sprintf("the server refused the TLS client certificate, or there is none; see tls_client_auth (%v)", trim(err)), discovery.ErrCredentials
	case errors.Is(err, nats.ErrSecureConnWanted):
		return "the server does not offer TLS", kind
	case errors.Is(err, nats.ErrSecureConnRequired):
		return "the server demands TLS", kind
	case errors.Is(err, nats.ErrTLS):
		return fmt.Sprintf("TLS failed: %v", trim(err)), kind
	case errors.As(err, &dns):
		return fmt.Sprintf("cannot resolve the name: %s", dns.Err), kind
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, nats.ErrNoServers):
		return "connection refused", kind
	case errors.Is(err, nats.ErrStaleConnection):
		return "it stopped answering", kind
	case isTimeout(err):
		return "it does not answer", kind
	case isClosed(err):
		return "the server closed the connection", kind
	default:
		return trim(err), kind
	}
}

func isAuth(err error) bool {
	for _, target := range []error{
		nats.ErrAuthorization, nats.ErrAuthExpired, nats.ErrAuthRevoked, nats.ErrAccountAuthExpired,
		nats.ErrNkeysNotSupported,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	// What the server says while it lets us in is not always turned into those.
	text := strings.ToLower(err.Error())
	return strings.Contains(text, "authentication expired") || strings.Contains(text, "authentication revoked")
}

func authText(err error) string {
	switch text := strings.ToLower(err.Error()); {
	case strings.Contains(text, "account authentication expired"):
		return "the account has expired"
	case strings.Contains(text, "expired"):
		return "the credentials have expired"
	case strings.Contains(text, "revoked"):
		return "the credentials were revoked"
	case errors.Is(err, nats.ErrNkeysNotSupported):
		return "the server knows no nkeys"
	default:
		return "the server refused the credentials, or there are none"
	}
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, nats.ErrTimeout) ||
		errors.As(err, &timeout) && timeout.Timeout()
}

func isClosed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) ||
		errors.Is(err, nats.ErrConnectionClosed)
}

// trim takes the name of the library off a message.
func trim(err error) string { return strings.TrimPrefix(err.Error(), "nats: ") }

// Explain turns an error of an operation over the link into one that wraps an
// error of package discovery, if it is about the link or about time; it returns nil
// if it is about something else. ctx is the guarded context of the operation, parent
// that of the caller.
func (l *Link) Explain(parent, ctx context.Context, err error) error {
	switch {
	case discovery.Explained(err):
		return err
	case errors.Is(err, nats.ErrConnectionClosed):
		// The client says so before it tells why.
		<-l.Lost()
		return l.Err()
	case ctx.Err() == nil:
		return nil
	case discovery.Explained(context.Cause(ctx)):
		return context.Cause(ctx)
	case errors.Is(parent.Err(), context.Canceled):
		return parent.Err()
	}
	return fmt.Errorf("%w: no answer in time from %s: %w", discovery.ErrUnreachable, l.Address(), ctx.Err())
}

// Broken returns the error of a watch that broke with err: that of ctx once it has
// ended, or else one that wraps [discovery.ErrBroken] and names what was watched.
func Broken(ctx context.Context, what string, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case !errors.Is(err, discovery.ErrBroken):
		err = fmt.Errorf("%w: %w", discovery.ErrBroken, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}
