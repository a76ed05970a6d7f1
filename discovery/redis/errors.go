package redis

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// failure is an error of the server or of the way to it, once it is understood.
// It hides the client library's error on purpose: the library would take a
// connection that failed with an error of a server (a Sentinel's refusal) for a
// sound one.
type failure struct {
	kind error  // of package discovery
	text string // what happened and what would help
}

func (f *failure) Error() string { return f.kind.Error() + ": " + f.text }
func (f *failure) Unwrap() error { return f.kind }

// explanations are what servers answer. Redis 6 and before put the error of a
// command in a script in the middle of their own, after a dash; hence contains.
var explanations = []struct {
	marks string // each by itself
	kind  error
	hint  string
}{
	{"WRONGPASS", discovery.ErrCredentials, "check the user name and the password"},
	// The second for a command with many arguments before a login.
	{"NOAUTH|unauthenticated", discovery.ErrCredentials, "the server asks for a password"},
	{"without any password configured", discovery.ErrCredentials, "the server has no password: give none, or a user name too"},
	{"invalid password", discovery.ErrCredentials, "check the password"},
	{"NOPERM", discovery.ErrPermission, "give the user the command, key or channel that the server names"},
	{"can't run this command", discovery.ErrPermission, "give the user the commands that the package names"},
	{"DENIED", discovery.ErrPermission, "the server is in protected mode: it needs a password, or to listen on loopback only"},
	{"READONLY", discovery.ErrPermission, "this is a replica: name the master, or use mode sentinel"},
	{"WRONGTYPE", discovery.ErrInvalid, "the key holds something else: choose another key or layout"},
	{"CROSSSLOT|MOVED", discovery.ErrInvalid, "the server is part of a cluster: use mode cluster"},
	{"cluster support disabled", discovery.ErrInvalid, "the server is no cluster: use mode single"},
	{"DB index is out of range", discovery.ErrInvalid, "the server has fewer databases"},
	{"SELECT is not allowed in cluster mode", discovery.ErrInvalid, "the server is part of a cluster: use mode cluster and database 0"},
	{"OOM", discovery.ErrFull, "raise the server's maxmemory"},
	{"MISCONF", discovery.ErrFull, "the server cannot write to its disk"},
	{"LOADING", discovery.ErrUnreachable, "the server is still loading its data"},
	{"CLUSTERDOWN", discovery.ErrUnreachable, "the cluster is down, or nobody serves this key"},
	{"MASTERDOWN", discovery.ErrUnreachable, "the server is a replica that lost its master"},
	{"NOREPLICAS", discovery.ErrUnreachable, "the server has too few replicas to take writes"},
	{"TRYAGAIN", discovery.ErrUnreachable, "the cluster is moving this key"},
	{"max number of clients", discovery.ErrUnreachable, "raise the server's maxclients"},
	{"BUSY", discovery.ErrUnreachable, "a script keeps the server busy"},
	{"unknown command|Unknown Redis command", discovery.ErrUnsupported, "want Redis 5 or later"},
}

// explain turns an error of the client library into one of package discovery.
// It passes on the error of a context, what is wrong with a file of ours, and what
// it has explained already.
func explain(err error) error {
	if err == nil || is[*failure](err) || errors.Is(err, context.Canceled) || errors.Is(err, discovery.ErrInvalid) {
		return err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: no answer in time: %w", discovery.ErrUnreachable, context.DeadlineExceeded)
	}
	if answer, ok := errors.AsType[goredis.Error](err); ok {
		text := answer.Error()
		for _, e := range explanations {
			if slices.ContainsFunc(strings.Split(e.marks, "|"), func(mark string) bool { return strings.Contains(text, mark) }) {
				return &failure{e.kind, text + " (" + e.hint + ")"}
			}
		}
		return &failure{discovery.ErrUnsupported, text}
	}
	switch {
	case saidByServer(err):
		return &failure{discovery.ErrCredentials, err.Error() + " (the server refused the TLS handshake: check the client's certificate)"}
	case is[x509.UnknownAuthorityError](err):
		return &failure{discovery.ErrUnreachable, err.Error() + " (name the authority that signed the server's certificate)"}
	case is[x509.HostnameError](err):
		return &failure{discovery.ErrUnreachable, err.Error() + " (set the TLS server name to the name in the server's certificate)"}
	case is[tls.RecordHeaderError](err):
		return &failure{discovery.ErrUnreachable, err.Error() + " (does the server speak TLS at this port?)"}
	case errors.Is(err, goredis.ErrPoolTimeout), errors.Is(err, goredis.ErrPoolExhausted):
		return &failure{discovery.ErrUnreachable, "the commands before this one have no answer yet"}
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return &failure{discovery.ErrUnreachable, "the server closed the connection (if it always does: does it want TLS?)"}
	case errors.Is(err, goredis.ErrClosed), errors.Is(err, net.ErrClosed):
		return &failure{discovery.ErrUnreachable, "the connection was closed"}
	}
	return &failure{discovery.ErrUnreachable, err.Error()}
}

// scriptLine finds the line of a script in an error of Redis, which before
// version 7.2 does not name the command that was refused there.
var scriptLine = regexp.MustCompile(`@user_script:\s*(\d+)`)

// scriptCommand finds the command in a line of a script.
var scriptCommand = regexp.MustCompile(`redis\.p?call\('(\w+)'`)

// explainScript explains that a script may not use a command, and leaves other
// errors as they are.
func explainScript(err error, source string) error {
	explained := explain(err)
	if !errors.Is(explained, discovery.ErrPermission) {
		return err
	}
	err = explained
	if m := scriptLine.FindStringSubmatch(err.Error()); m != nil {
		lines := strings.Split(source, "\n")
		if n, _ := strconv.Atoi(m[1]); n > 0 && n <= len(lines) {
			if command := scriptCommand.FindStringSubmatch(lines[n-1]); command != nil {
				return fmt.Errorf("%w: it needs the command %s", err, command[1])
			}
		}
	}
	return err
}

// wrongType reports whether the key holds something else than the command is for.
func wrongType(err error) bool { return goredis.HasErrorPrefix(err, "WRONGTYPE") }

// is reports whether there is an error of the type in the tree of an error.
func is[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// isTimeout reports whether a socket's deadline passed.
func isTimeout(err error) bool {
	network, ok := errors.AsType[net.Error](err)
	return ok && network.Timeout()
}

// saidByServer reports whether the server said over TLS why it closes the connection.
func saidByServer(err error) bool {
	operation, ok := errors.AsType[*net.OpError](err)
	return ok && operation.Op == "remote error"
}

// broken says that a watch ended, and why.
func broken(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, discovery.ErrBroken) {
		return err
	}
	return fmt.Errorf("%w: %w", discovery.ErrBroken, explain(err))
}
