package natstest_test

import (
	"testing"

	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/internal/natstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

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
