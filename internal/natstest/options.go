package natstest

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
)

// An Option changes how a server starts.
type Option func(*Server)

// NoJetStream leaves JetStream off.
func NoJetStream() Option {
	return func(s *Server) {
		s.options.JetStream = false
		s.options.StoreDir = ""
	}
}

// Domain puts the server's JetStream into a domain.
func Domain(name string) Option {
	return func(s *Server) { s.options.JetStreamDomain = name }
}

// MaxStore bounds what JetStream may store, in bytes of file storage.
func MaxStore(bytes int64) Option {
	return func(s *Server) { s.options.JetStreamMaxStore = bytes }
}

// MaxMemory bounds what JetStream may keep in memory, in bytes.
func MaxMemory(bytes int64) Option {
	return func(s *Server) { s.options.JetStreamMaxMemory = bytes }
}

// Configure changes whatever has no option of its own.
func Configure(change func(*server.Options)) Option {
	return func(s *Server) { change(s.options) }
}

// A User may connect, and do what Publish and Subscribe permit: everything
// where they are nil.
type User struct {
	Name, Password     string
	Publish, Subscribe *server.SubjectPermission
}

// Users lets in these users only. [Server.Conn] connects as the first.
func Users(users ...User) Option {
	return func(s *Server) {
		for _, user := range users {
			s.options.Users = append(s.options.Users, &server.User{
				Username:    user.Name,
				Password:    user.Password,
				Permissions: &server.Permissions{Publish: user.Publish, Subscribe: user.Subscribe},
			})
		}
		s.login = append(s.login, nats.UserInfo(users[0].Name, users[0].Password))
	}
}

// Deny is a permission for everything but these subjects.
func Deny(subjects ...string) *server.SubjectPermission {
	return &server.SubjectPermission{Deny: subjects}
}

// Allow returns permissions that allow these subjects only.
func Allow(subjects ...string) *server.SubjectPermission {
	return &server.SubjectPermission{Allow: subjects}
}

// Token lets in whoever knows the token.
func Token(token string) Option {
	return func(s *Server) {
		s.options.Authorization = token
		s.login = append(s.login, nats.Token(token))
	}
}

// NKey lets in one user, by a key whose seed is in the file [Server.Seed].
func NKey() Option {
	return func(s *Server) {
		pair, err := nkeys.CreateUser()
		must(s, err)
		public, err := pair.PublicKey()
		must(s, err)
		seed, err := pair.Seed()
		must(s, err)
		s.Seed = filepath.Join(s.t.TempDir(), "user.nk")
		must(s, os.WriteFile(s.Seed, seed, 0o600))
		s.options.Nkeys = append(s.options.Nkeys, &server.NkeyUser{Nkey: public})
		s.login = append(s.login, nats.Nkey(public, pair.Sign))
	}
}

// Operator makes the server trust an operator of its own, and lets in one user
// of one account, by the credentials file [Server.Creds].
func Operator() Option {
	return OperatorUntil(time.Time{})
}

// OperatorUntil is Operator with credentials that expire.
func OperatorUntil(expires time.Time) Option {
	return operator(expires, func(limits *jwt.OperatorLimits) { limits.JetStreamLimits = unlimited })
}

// AccountLimits is Operator with an account that may do what limits says. The
// members of a cluster that share the option share the account.
func AccountLimits(limits jwt.JetStreamLimits) Option {
	return operator(time.Time{}, func(o *jwt.OperatorLimits) { o.JetStreamLimits = limits })
}

// Tiers is Operator with an account that may only keep streams of these numbers
// of replicas: "R1", "R3". The members of a cluster that share the option share
// the account.
func Tiers(names ...string) Option {
	return operator(time.Time{}, func(o *jwt.OperatorLimits) {
		o.JetStreamTieredLimits = make(jwt.JetStreamTieredLimits)
		for _, name := range names {
			o.JetStreamTieredLimits[name] = unlimited
		}
	})
}

var unlimited = jwt.JetStreamLimits{MemoryStorage: -1, DiskStorage: -1, Streams: -1, Consumer: -1}

func operator(expires time.Time, limit func(*jwt.OperatorLimits)) Option {
	var (
		claims   *jwt.OperatorClaims // once made, the same for every server
		resolver = &server.MemAccResolver{}
		creds    []byte
	)
	found := func(s *Server) {
		operator, operatorID := create(s, nkeys.CreateOperator)
		_, systemID := create(s, nkeys.CreateAccount)
		account, accountID := create(s, nkeys.CreateAccount)
		user, userID := create(s, nkeys.CreateUser)

		claims = jwt.NewOperatorClaims(operatorID)
		claims.SystemAccount = systemID

		systemClaims := jwt.NewAccountClaims(systemID)
		systemJWT, err := systemClaims.Encode(operator)
		must(s, err)

		accountClaims := jwt.NewAccountClaims(accountID)
		limit(&accountClaims.Limits)
		accountJWT, err := accountClaims.Encode(operator)
		must(s, err)

		userClaims := jwt.NewUserClaims(userID)
		if !expires.IsZero() {
			userClaims.Expires = expires.Unix()
		}
		userJWT, err := userClaims.Encode(account)
		must(s, err)
		seed, err := user.Seed()
		must(s, err)
		creds, err = jwt.FormatUserConfig(userJWT, seed)
		must(s, err)

		must(s, resolver.Store(systemID, systemJWT))
		must(s, resolver.Store(accountID, accountJWT))
	}
	return func(s *Server) {
		if claims == nil {
			found(s)
		}
		s.Creds = filepath.Join(s.t.TempDir(), "user.creds")
		must(s, os.WriteFile(s.Creds, creds, 0o600))
		s.options.TrustedOperators = []*jwt.OperatorClaims{claims}
		s.options.SystemAccount = claims.SystemAccount
		s.options.AccountResolver = resolver
		s.login = append(s.login, nats.UserCredentials(s.Creds))
	}
}

func create(s *Server, kind func() (nkeys.KeyPair, error)) (nkeys.KeyPair, string) {
	s.t.Helper()
	pair, err := kind()
	must(s, err)
	id, err := pair.PublicKey()
	must(s, err)
	return pair, id
}

// TLS makes the server demand TLS, with the certificates of [Server.TLS].
func TLS() Option { return withTLS(false) }

// MutualTLS makes the server demand TLS and a certificate of the client's, as
// in [Server.TLS].
func MutualTLS() Option { return withTLS(true) }

func withTLS(mutual bool) Option {
	return func(s *Server) {
		s.TLS = certtest.New(s.t)
		s.options.TLS = true
		s.options.TLSVerify = mutual
		s.options.TLSTimeout = ready.Seconds()
		s.RenewCertificates()
		s.scheme = "tls"
		s.login = append(s.login, nats.RootCAs(s.TLS.CA))
		if mutual {
			s.login = append(s.login, nats.ClientCert(s.TLS.ClientCert, s.TLS.ClientKey))
		}
	}
}

// RenewCertificates makes the server use, from its next start, what the files of
// [Server.TLS] hold by now.
func (s *Server) RenewCertificates() {
	s.t.Helper()
	config, err := server.GenTLSConfig(&server.TLSConfigOpts{
		CertFile: s.TLS.ServerCert,
		KeyFile:  s.TLS.ServerKey,
		CaFile:   s.TLS.CA,
		Verify:   s.options.TLSVerify,
		Timeout:  ready.Seconds(),
	})
	must(s, err)
	s.options.TLSConfig = config
}

// HandshakeFirst makes a server with TLS wait for the handshake before it says
// anything. It comes after TLS or MutualTLS.
func HandshakeFirst() Option {
	return func(s *Server) {
		s.options.TLSHandshakeFirst = true
		s.login = append(s.login, nats.TLSHandshakeFirst())
	}
}

// Cluster makes the server a member of a cluster whose other members are given;
// the first has none. Its name must differ from theirs.
func Cluster(name string, others ...*Server) Option {
	return func(s *Server) {
		s.options.ServerName = name
		s.options.Cluster = server.ClusterOpts{Name: "natstest", Host: "127.0.0.1", Port: server.RANDOM_PORT}
		for _, other := range others {
			s.options.Routes = append(s.options.Routes, server.RoutesFromStr(
				fmt.Sprintf("nats-route://%s", other.running.ClusterAddr()))...)
		}
	}
}

func must(s *Server, err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatalf("preparing a NATS server: %v", err)
	}
}
