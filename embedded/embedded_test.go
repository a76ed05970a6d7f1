package embedded

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// Caddy's own storage must not end up in somebody's home.
	dir, err := os.MkdirTemp("", "embedded")
	if err != nil {
		panic(err)
	}
	os.Setenv("XDG_DATA_HOME", dir)
	os.Setenv("XDG_CONFIG_HOME", dir)
	caddy.RegisterModule(quitter{})
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		os.RemoveAll(dir)
		os.Exit(code)
	}))
}

// options are one configuration of the app.
type options map[string]any

// config returns a configuration of Caddy with the app and others beside it.
func config(t *testing.T, app options, others ...string) []byte {
	t.Helper()
	apps := options{"nats_server": app}
	for _, name := range others {
		apps[name] = options{}
	}
	b, err := json.Marshal(options{
		"admin": options{"disabled": true, "config": options{"persist": false}},
		"logging": options{"logs": options{"default": options{
			"level": "WARN",
		}}},
		"apps": apps,
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// load makes Caddy run the configuration.
func load(t *testing.T, app options, others ...string) error {
	t.Helper()
	t.Cleanup(func() {
		if err := caddy.Stop(); err != nil {
			t.Errorf("stopping Caddy: %v", err)
		}
	})
	return caddy.Load(config(t, app, others...), true)
}

func mustLoad(t *testing.T, app options, others ...string) {
	t.Helper()
	if err := load(t, app, others...); err != nil {
		t.Fatal(err)
	}
}

// onFreePort returns a configuration that can be loaded.
func onFreePort(t *testing.T) options {
	t.Helper()
	return options{"listen": freeAddress(t), "store": filepath.Join(t.TempDir(), "store")}
}

// with returns a copy of the configuration with one value changed.
func (o options) with(key string, value any) options {
	changed := options{}
	for k, v := range o {
		changed[k] = v
	}
	changed[key] = value
	return changed
}

func (o options) url() string { return "nats://" + o["listen"].(string) }

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// connect returns a client that comes back quickly after a restart.
func connect(t *testing.T, url string, opts ...nats.Option) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(url, append(opts, nats.ReconnectWait(10*time.Millisecond), nats.MaxReconnects(-1))...)
	if err != nil {
		t.Fatalf("connecting: %v", err)
	}
	t.Cleanup(nc.Close)
	return nc
}

func timeout(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// bucket returns the fleet's bucket, created if it is missing.
func bucket(t *testing.T, nc *nats.Conn) jetstream.KeyValue {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	kv, err := js.CreateOrUpdateKeyValue(timeout(t), jetstream.KeyValueConfig{
		Bucket: "catga_nodes", History: 10, MaxBytes: 10 << 20,
	})
	if err != nil {
		t.Fatalf("creating the bucket: %v", err)
	}
	return kv
}

func put(t *testing.T, kv jetstream.KeyValue, key string) {
	t.Helper()
	if _, err := kv.Put(timeout(t), key, []byte("x")); err != nil {
		t.Fatalf("putting %s: %v", key, err)
	}
}

// eventuallyHas waits until the client, which may have to reconnect first,
// reads the key.
func eventuallyHas(t *testing.T, kv jetstream.KeyValue, key string) {
	t.Helper()
	ctx := timeout(t)
	for {
		attempt, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		_, err := kv.Get(attempt, key)
		cancel()
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("reading %s: %v", key, err)
		}
	}
}

// want checks that an error says all of this.
func want(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q\nlacks %q", err, part)
		}
	}
}

func TestServesJetStream(t *testing.T) {
	cfg := onFreePort(t)
	mustLoad(t, cfg)
	kv := bucket(t, connect(t, cfg.url()))
	put(t, kv, "node.a")
	eventuallyHas(t, kv, "node.a")

	fi, err := os.Stat(cfg["store"].(string))
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm() != 0o700 {
		t.Errorf("the store has mode %v, want 0700", fi.Mode().Perm())
	}
}

func TestDefaults(t *testing.T) {
	s, err := new(App).resolve(caddy.NewReplacer())
	if err != nil {
		t.Fatal(err)
	}
	w := settings{
		listen:   "127.0.0.1:4222",
		host:     "127.0.0.1",
		port:     4222,
		store:    filepath.Join(caddy.AppDataDir(), "nats"),
		maxStore: 256 << 20,
	}
	if s != w {
		t.Errorf("settings %+v, want %+v", s, w)
	}
}

func TestReloadKeepsClients(t *testing.T) {
	cfg := onFreePort(t)
	mustLoad(t, cfg)
	nc := connect(t, cfg.url())
	id, err := nc.GetClientID()
	if err != nil {
		t.Fatal(err)
	}
	srv := nc.ConnectedServerId()

	for range 3 {
		mustLoad(t, cfg)
	}
	// The same in other words: the pool goes by what a configuration means.
	t.Setenv("EMBEDDED_TEST_STORE", cfg["store"].(string))
	mustLoad(t, cfg.with("store", "{env.EMBEDDED_TEST_STORE}/../store").with("max_store", 256<<20))

	if err := nc.FlushTimeout(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	again, err := nc.GetClientID()
	if err != nil {
		t.Fatal(err)
	}
	if again != id || nc.ConnectedServerId() != srv || nc.Stats().Reconnects != 0 {
		t.Errorf("client %d of %s became %d of %s after %d reconnects", id, srv, again, nc.ConnectedServerId(), nc.Stats().Reconnects)
	}
}

func TestReloadWithChange(t *testing.T) {
	cfg := onFreePort(t)
	elsewhere := freeAddress(t)
	for _, c := range []struct {
		name    string
		changed options
	}{
		{"more room", cfg.with("max_store", 300<<20)},
		{"less room", cfg.with("max_store", 20<<20)},
		{"another address", cfg.with("listen", elsewhere)},
		{"a user", cfg.with("user", options{"name": "fleet", "password": "secret"})},
	} {
		t.Run(c.name, func(t *testing.T) {
			mustLoad(t, cfg)
			kv := bucket(t, connect(t, cfg.url()))
			put(t, kv, "node.a")

			mustLoad(t, c.changed)
			after := bucket(t, connect(t, c.changed.url(), nats.UserInfo("fleet", "secret")))
			eventuallyHas(t, after, "node.a")
			if c.changed.url() == cfg.url() && c.changed["user"] == nil {
				eventuallyHas(t, kv, "node.a") // the client that was there comes back by itself
			}
		})
	}
}

func TestChangedStoreIsAnotherServer(t *testing.T) {
	cfg := onFreePort(t)
	mustLoad(t, cfg)
	kv := bucket(t, connect(t, cfg.url()))
	put(t, kv, "node.a")

	mustLoad(t, cfg.with("store", filepath.Join(t.TempDir(), "other")))
	js, err := jetstream.New(connect(t, cfg.url()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.KeyValue(timeout(t), "catga_nodes"); !errors.Is(err, jetstream.ErrBucketNotFound) {
		t.Errorf("looking for the old bucket: %v, want %v", err, jetstream.ErrBucketNotFound)
	}
}

func TestFailedReloadBringsTheOldServerBack(t *testing.T) {
	cfg := onFreePort(t)
	mustLoad(t, cfg)
	kv := bucket(t, connect(t, cfg.url()))
	put(t, kv, "node.a")

	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	// The store is the same, so the old server has to go before the new one can
	// find out that its address is taken.
	want(t, load(t, cfg.with("listen", taken.Addr().String())), taken.Addr().String(), "address already in use")
	eventuallyHas(t, kv, "node.a")
}

// A quitter is an app that fails to start once the server of the new
// configuration has.
type quitter struct{}

func (quitter) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "embedded_test_quitter", New: func() caddy.Module { return new(quitter) }}
}

func (quitter) Start() error {
	lifecycle.Lock()
	defer lifecycle.Unlock()
	if all := instances(); len(all) > 1 && all[0].server != nil {
		return errors.New("no, thank you")
	}
	return nil
}

func (quitter) Stop() error { return nil }

func TestConfigThatFailsLaterBringsTheOldServerBack(t *testing.T) {
	cfg := onFreePort(t)
	mustLoad(t, cfg)
	kv := bucket(t, connect(t, cfg.url()))
	put(t, kv, "node.a")

	// Caddy starts apps in random order: reload until the server came first.
	for deadline := timeout(t); ; {
		err := load(t, cfg.with("max_store", 300<<20), "embedded_test_quitter")
		if err != nil {
			want(t, err, "no, thank you")
			break
		}
		if deadline.Err() != nil {
			t.Fatal("the server never started first")
		}
		mustLoad(t, cfg)
	}
	eventuallyHas(t, kv, "node.a")
	lifecycle.Lock()
	all := instances()
	lifecycle.Unlock()
	if len(all) != 1 || all[0].maxStore != defaultMaxStore {
		t.Errorf("%d instances, want the first alone", len(all))
	}
}

func TestPortTaken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	want(t, load(t, onFreePort(t).with("listen", l.Addr().String())),
		"listen address "+l.Addr().String(), "address already in use")

	_, err = acquire(settings{listen: l.Addr().String(), store: t.TempDir(), maxStore: 1 << 20}, nil)
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("error %v, want %v", err, syscall.EADDRINUSE)
	}
}

func TestStoreNotWritable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want(t, load(t, onFreePort(t).with("store", filepath.Join(file, "store"))),
		"store "+filepath.Join(file, "store"), "not a directory")
	want(t, load(t, onFreePort(t).with("store", file)), "store "+file, "not a directory")
}

func TestStoreInUse(t *testing.T) {
	cfg := onFreePort(t)
	store := cfg["store"].(string)
	if err := os.Mkdir(store, 0o700); err != nil {
		t.Fatal(err)
	}
	other, err := lockStore(store)
	if err != nil {
		t.Fatal(err)
	}
	want(t, load(t, cfg), "store "+store, "in use by another process")
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	mustLoad(t, cfg)
	if _, err := lockStore(store); err == nil {
		t.Error("the store of a running server could be locked")
	}
}

func TestNotOnLoopback(t *testing.T) {
	_, port, err := net.SplitHostPort(freeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"0.0.0.0", "", "::", "registry.example.com", "192.0.2.1"} {
		listen := net.JoinHostPort(host, port)
		want(t, caddy.Validate(parsed(t, onFreePort(t).with("listen", listen))),
			listen, "can be reached from other machines", "set a user and password", defaultListen)
	}
	for _, host := range []string{"127.0.0.1", "127.0.0.2", "::1", "localhost"} {
		if err := caddy.Validate(parsed(t, onFreePort(t).with("listen", net.JoinHostPort(host, port)))); err != nil {
			t.Errorf("%s is refused: %v", host, err)
		}
	}

	cfg := onFreePort(t).with("user", options{"name": "fleet", "password": "secret"}).with("listen", "0.0.0.0:"+port)
	mustLoad(t, cfg)
	if err := connect(t, "nats://fleet:secret@127.0.0.1:"+port).FlushTimeout(10 * time.Second); err != nil {
		t.Error(err)
	}
}

func TestUser(t *testing.T) {
	t.Setenv("EMBEDDED_TEST_PASSWORD", "secret")
	cfg := onFreePort(t).with("user", options{"name": "fleet", "password": "{env.EMBEDDED_TEST_PASSWORD}"})
	mustLoad(t, cfg)
	bucket(t, connect(t, cfg.url(), nats.UserInfo("fleet", "secret")))
	for _, c := range [][2]string{{"fleet", "wrong"}, {"other", "secret"}, {"", ""}} {
		if _, err := nats.Connect(cfg.url(), nats.UserInfo(c[0], c[1])); !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("user %q with password %q: %v, want %v", c[0], c[1], err, nats.ErrAuthorization)
		}
	}
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	writeCertificate(t, cert, key, 1)
	cfg := onFreePort(t).with("tls", options{"certificate": cert, "key": key})
	mustLoad(t, cfg)

	var serial atomic.Int64
	secure := func() nats.Option {
		return nats.Secure(&tls.Config{
			InsecureSkipVerify: true, // the serial number is what is checked
			VerifyConnection: func(cs tls.ConnectionState) error {
				serial.Store(cs.PeerCertificates[0].SerialNumber.Int64())
				return nil
			},
		})
	}
	nc := connect(t, cfg.url(), secure())
	bucket(t, nc)
	if serial.Load() != 1 {
		t.Errorf("certificate %d, want 1", serial.Load())
	}

	writeCertificate(t, cert, key, 2)
	mustLoad(t, cfg)
	connect(t, cfg.url(), secure())
	if serial.Load() != 2 {
		t.Errorf("certificate %d after its renewal, want 2", serial.Load())
	}
	if err := nc.FlushTimeout(10 * time.Second); err != nil || nc.Stats().Reconnects != 0 {
		t.Errorf("the renewal cut a client off: %d reconnects, %v", nc.Stats().Reconnects, err)
	}
}

func TestBadTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	writeCertificate(t, cert, key, 1)
	junk := filepath.Join(dir, "junk.pem")
	if err := os.WriteFile(junk, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(dir, "missing.pem")
	for _, c := range []struct {
		certificate, key string
		parts            []string
	}{
		{missing, key, []string{missing, "no such file"}},
		{cert, missing, []string{missing, "no such file"}},
		{junk, key, []string{junk, "PEM"}},
		{cert, junk, []string{junk, "PEM"}},
		{cert, "", []string{"tls key is missing"}},
		{"", key, []string{"tls certificate is missing"}},
	} {
		want(t, caddy.Validate(parsed(t, onFreePort(t).with("tls", options{"certificate": c.certificate, "key": c.key}))), c.parts...)
	}
}

func TestRefused(t *testing.T) {
	for _, c := range []struct {
		name  string
		cfg   options
		parts []string
	}{
		{"no port", options{"listen": "127.0.0.1"}, []string{`"127.0.0.1"`, "host and a port", defaultListen}},
		{"port 0", options{"listen": "127.0.0.1:0"}, []string{`"127.0.0.1:0"`, "1 to 65535"}},
		{"port range", options{"listen": "127.0.0.1:4222-4223"}, []string{"4222-4223", "1 to 65535"}},
		{"socket", options{"listen": "unix//run/nats.sock"}, []string{"unix//run/nats.sock", "host and a port"}},
		{"negative size", options{"max_store": -1}, []string{"max_store -1", "greater than 0"}},
		{"no password", options{"user": options{"name": "fleet"}}, []string{"user password is missing"}},
		{"no name", options{"user": options{"password": "secret"}}, []string{"user name is missing"}},
		{"unset variable", options{"user": options{"name": "fleet", "password": "{env.EMBEDDED_TEST_UNSET}"}},
			[]string{"user password", "{env.EMBEDDED_TEST_UNSET}"}},
		{"unknown field", options{"ports": 1}, []string{"ports"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := caddy.Validate(parsed(t, c.cfg))
			want(t, err, c.parts...)
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("error %q tells the password", err)
			}
		})
	}
}

func TestValidateStartsNothing(t *testing.T) {
	cfg := onFreePort(t)
	if err := caddy.Validate(parsed(t, cfg)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(cfg["store"].(string)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("validating made a store: %v", err)
	}
	if nc, err := nats.Connect(cfg.url()); err == nil {
		nc.Close()
		t.Error("validating started a server")
	}
}

func TestStopLeavesNothing(t *testing.T) {
	cfg := onFreePort(t)
	before := goleak.IgnoreCurrent()
	mustLoad(t, cfg)
	nc := connect(t, cfg.url(), nats.NoReconnect())
	closed := make(chan struct{})
	nc.SetClosedHandler(func(*nats.Conn) { close(closed) })
	put(t, bucket(t, nc), "node.a")

	if err := caddy.Stop(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-closed:
	case <-timeout(t).Done():
		t.Fatal("the client is still connected")
	}
	goleak.VerifyNone(t, before)
	l, err := net.Listen("tcp", cfg["listen"].(string))
	if err != nil {
		t.Fatalf("the port is still taken: %v", err)
	}
	l.Close()

	// What was stored is there again.
	mustLoad(t, cfg)
	eventuallyHas(t, bucket(t, connect(t, cfg.url())), "node.a")
}

func TestRemovedByReload(t *testing.T) {
	cfg := onFreePort(t)
	mustLoad(t, cfg)
	if err := caddy.Load([]byte(`{"admin":{"disabled":true,"config":{"persist":false}}}`), true); err != nil {
		t.Fatal(err)
	}
	if nc, err := nats.Connect(cfg.url()); err == nil {
		nc.Close()
		t.Error("a server that no configuration names still runs")
	}
}

func parsed(t *testing.T, app options) *caddy.Config {
	t.Helper()
	cfg := new(caddy.Config)
	if err := json.Unmarshal(config(t, app), cfg); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// writeCertificate writes a certificate that signs itself.
func writeCertificate(t *testing.T, cert, key string, serial int64) {
	t.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
		IPAddresses:  []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, priv.Public(), priv)
	if err != nil {
		t.Fatal(err)
	}
	der2, err := x509.MarshalPKCS8PrivateKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		cert: {Type: "CERTIFICATE", Bytes: der},
		key:  {Type: "PRIVATE KEY", Bytes: der2},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
