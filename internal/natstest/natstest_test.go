package natstest_test

import (
	"testing"

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
