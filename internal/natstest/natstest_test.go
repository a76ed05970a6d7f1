package natstest_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestMain(m *testing.M) {
	if natstest.Child() {
		return
	}
	goleak.VerifyTestMain(m)
}

func TestProcessKeepsPortAndStore(t *testing.T) {
	t.Parallel()
	p := natstest.StartProcess(t)
	url := p.URL()
	for _, value := range []string{"before", "after"} {
		nc, err := nats.Connect(p.URL())
		if err != nil {
			t.Fatal(err)
		}
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		kv, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "b"})
		if err != nil {
			t.Fatal(err)
		}
		revision, err := kv.PutString(t.Context(), "k", value)
		if want := map[string]uint64{"before": 1, "after": 2}[value]; err != nil || revision != want {
			t.Errorf("%s the restart: revision %d, %v, want %d", value, revision, err, want)
		}
		nc.Close()
		p.Stop()
		p.Start()
	}
	if p.URL() != url {
		t.Errorf("the URL is %s after the restart, was %s", p.URL(), url)
	}
}

func TestProcessTakesOtherUsers(t *testing.T) {
	t.Parallel()
	users := func(names ...string) string {
		var list []string
		for _, name := range names {
			list = append(list, "{user: "+name+", password: pw}")
		}
		return "authorization { users: [" + strings.Join(list, ", ") + "] }"
	}
	p := natstest.StartProcess(t, users("a", "b"))
	closed := make(chan struct{})
	nc, err := nats.Connect(p.URL(), nats.UserInfo("b", "pw"), nats.NoReconnect(),
		nats.ClosedHandler(func(*nats.Conn) { close(closed) }))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	p.Reload(users("a"))
	<-closed
	if nc, err := nats.Connect(p.URL(), nats.UserInfo("b", "pw")); !errors.Is(err, nats.ErrAuthorization) {
		nc.Close()
		t.Errorf("a user that is gone is let in: %v", err)
	}
	p.Reload(users("a", "b"))
	back, err := nats.Connect(p.URL(), nats.UserInfo("b", "pw"))
	if err != nil {
		t.Fatal(err)
	}
	back.Close()
}

func TestProcessGoesBack(t *testing.T) {
	t.Parallel()
	p := natstest.StartProcess(t)
	put := func() uint64 {
		t.Helper()
		nc, err := nats.Connect(p.URL())
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		js, err := jetstream.New(nc)
		if err != nil {
			t.Fatal(err)
		}
		kv, err := js.CreateKeyValue(t.Context(), jetstream.KeyValueConfig{Bucket: "b"})
		if err != nil {
			t.Fatal(err)
		}
		revision, err := kv.PutString(t.Context(), "k", "v")
		if err != nil {
			t.Fatal(err)
		}
		return revision
	}
	put()
	p.Stop()
	saved := p.Save()
	p.Start()
	if n := put(); n != 2 {
		t.Errorf("revision %d after the start, want 2", n)
	}
	p.Kill()
	p.Restore(saved)
	p.Start()
	if n := put(); n != 2 {
		t.Errorf("revision %d in the older store, want 2", n)
	}
}

func TestProcesses(t *testing.T) {
	t.Parallel()
	processes := natstest.StartProcesses(t, 3)
	nc, err := nats.Connect(processes[0].URL())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		_, err := js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "b", Replicas: 3})
		cancel()
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	admin, err := nats.Connect(processes[1].URL(), nats.UserInfo(natstest.SystemUser, natstest.SystemUser))
	if err != nil {
		t.Fatal(err)
	}
	defer admin.Close()
	if answer, err := admin.Request("$JS.API.META.LEADER.STEPDOWN", nil, 10*time.Second); err != nil || !strings.Contains(string(answer.Data), `"success":true`) {
		t.Errorf("the leader does not step down: %v, %v", answer, err)
	}
}

func TestRestartKeepsPortAndStore(t *testing.T) {
	t.Parallel()
	s := natstest.Start(t)
	port := s.Port
	kv := s.Bucket(jetstream.KeyValueConfig{Bucket: "b"})
	if _, err := kv.PutString(t.Context(), "k", "v"); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	s.Restart()
	if s.Port != port {
		t.Errorf("port is %d after the restart, was %d", s.Port, port)
	}
	entry, err := s.KeyValue("b").Get(t.Context(), "k")
	if err != nil || string(entry.Value()) != "v" {
		t.Errorf("Get after the restart = %v, %v", entry, err)
	}
	if n := s.NumClients(); n < 1 {
		t.Errorf("NumClients = %d, want at least 1", n)
	}
}

func TestLogins(t *testing.T) {
	t.Parallel()
	for name, options := range map[string][]natstest.Option{
		"token":      {natstest.Token("secret")},
		"user":       {natstest.Users(natstest.User{Name: "u", Password: "p"})},
		"nkey":       {natstest.NKey()},
		"operator":   {natstest.Operator()},
		"TLS":        {natstest.TLS()},
		"mutual TLS": {natstest.MutualTLS()},
		"domain":     {natstest.Domain("hub")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := natstest.Start(t, options...)
			s.Bucket(jetstream.KeyValueConfig{Bucket: "b"})
		})
	}
}
