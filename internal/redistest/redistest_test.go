package redistest

import (
	"context"
	"os"
	"strconv"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestServerKeepsItsData(t *testing.T) {
	s := Start(t)
	ctx := context.Background()
	for i, end := range []func(){s.Stop, s.Kill} {
		key := strconv.Itoa(i)
		if err := s.Client().Set(ctx, key, "v", 0).Err(); err != nil {
			t.Fatal(err)
		}
		end()
		s.Restart()
		if got, err := s.Client().Get(ctx, key).Result(); err != nil || got != "v" {
			t.Errorf("after end %d the server holds %q, %v", i, got, err)
		}
	}
}

func TestServerGoesBack(t *testing.T) {
	s := Start(t)
	ctx := context.Background()
	set := func(value string) {
		t.Helper()
		if err := s.Client().Set(ctx, "k", value, 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	set("old")
	s.Stop()
	saved := s.Save()
	s.Restart()
	set("new")
	for _, c := range []struct{ copied, want string }{{saved, "old"}, {"", ""}} {
		s.Kill()
		s.Restore(c.copied)
		s.Restart()
		if got, _ := s.Client().Get(ctx, "k").Result(); got != c.want {
			t.Errorf("the server holds %q, want %q", got, c.want)
		}
	}
}

func TestClock(t *testing.T) {
	s := Start(t, Clock())
	ahead := func() time.Duration {
		t.Helper()
		now, err := s.Client().Time(context.Background()).Result()
		if err != nil {
			t.Fatal(err)
		}
		return time.Until(now).Round(time.Minute)
	}
	for _, want := range []time.Duration{0, 2 * time.Hour, -3 * time.Hour} {
		s.SetClock(want)
		if got := ahead(); got != want {
			t.Errorf("its clock is %v ahead, want %v", got, want)
		}
	}
	s.Stop()
	s.Restart()
	if got, want := ahead(), -3*time.Hour; got != want {
		t.Errorf("its clock is %v ahead after a restart, want %v", got, want)
	}
}

func TestServerEndsWithItsTest(t *testing.T) {
	var pid int
	t.Run("inner", func(t *testing.T) { pid = Start(t).PID() })
	if _, err := os.Stat("/proc/" + strconv.Itoa(pid)); err == nil {
		t.Errorf("process %d is still there", pid)
	}
}

func TestPause(t *testing.T) {
	s := Start(t)
	s.Pause()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := s.Client().Ping(ctx).Err(); err == nil {
		t.Error("a paused server answers")
	}
	s.Resume()
	if err := s.Client().Ping(context.Background()).Err(); err != nil {
		t.Error(err)
	}
}

func TestTLSAndPassword(t *testing.T) {
	s := Start(t, TLS(certtest.New(t), true), Password("pw"))
	if err := s.Client().Ping(context.Background()).Err(); err != nil {
		t.Error(err)
	}
}

func TestSentinel(t *testing.T) {
	s := StartSentinel(t, 1, "sentinel-pw", Password("pw"))
	s.Servers[0].Kill()
	until(t, "the replica takes over", func(context.Context) bool { return s.Master() == s.Servers[1] })
}

func TestCluster(t *testing.T) {
	c := StartCluster(t, 1)
	client := goredis.NewClusterClient(&goredis.ClusterOptions{Addrs: []string{c.Masters[0].Addr()}})
	defer func() { _ = client.Close() }()
	for i := range 20 {
		if err := client.Set(context.Background(), strconv.Itoa(i), "v", 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	owner := c.Owner("0")
	if n, err := owner.Client().Exists(context.Background(), "0").Result(); err != nil || n != 1 {
		t.Errorf("the owner of a key does not have it: %v, %v", n, err)
	}
}
