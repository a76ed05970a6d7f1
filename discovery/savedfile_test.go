package discovery_test

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// The file follows every change within seconds, is for its owner's eyes, and is
// confirmed while nothing changes.
func TestListFollowsEveryChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := warmFile(t)
		m := discoverytest.NewMemory()
		kept := func() string {
			data, err := os.ReadFile(file.Path)
			if err != nil {
				return err.Error()
			}
			return string(data)
		}
		write(m, newNode("first", discovery.KeyLease, "24h"))
		d := follow(t, m.Open(), discovery.Options{WarmStart: file})
		time.Sleep(3 * time.Second)
		synctest.Wait()
		if !strings.Contains(kept(), "first") {
			t.Errorf("three seconds after the listing: %s", kept())
		}
		if info, err := os.Stat(file.Path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
		if info, err := os.Stat(filepath.Dir(file.Path)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("mode of the folder %v, %v", info.Mode(), err)
		}
		for i := range 20 {
			write(m, newNode(fmt.Sprint("n", i), discovery.KeyLease, "24h"))
			time.Sleep(time.Second)
			if i >= 3 && !strings.Contains(kept(), fmt.Sprint("n", i-3)) {
				t.Errorf("n%d is not there after three seconds", i-3)
			}
		}
		time.Sleep(5 * time.Second)
		before := kept()
		time.Sleep(time.Hour)
		synctest.Wait()
		if kept() == before {
			t.Error("a list that did not change is not confirmed")
		}
		m.Break()
		time.Sleep(time.Minute)
		before = kept()
		time.Sleep(time.Hour)
		synctest.Wait()
		if kept() != before {
			t.Error("a list is confirmed while the registry is away")
		}
		if d.Stale().Round(time.Minute) != 61*time.Minute {
			t.Errorf("the view is %v old", d.Stale())
		}
		entries, err := os.ReadDir(filepath.Dir(file.Path))
		if err != nil || len(entries) != 2 {
			t.Errorf("the folder holds %v, %v, want the file and its lock", entries, err)
		}
	})
}

func TestListThatCannotBeUsedIsSetAside(t *testing.T) {
	for _, test := range []struct {
		name   string
		spoil  func(t *testing.T, w *discovery.WarmStart)
		reason string // "": it is used
	}{
		{"good", func(*testing.T, *discovery.WarmStart) {}, ""},
		{"a day old", func(*testing.T, *discovery.WarmStart) { time.Sleep(24*time.Hour + time.Second) }, "written 24h0m1s ago"},
		{"not quite a day old", func(*testing.T, *discovery.WarmStart) { time.Sleep(23 * time.Hour) }, ""},
		{"of another registry", func(_ *testing.T, w *discovery.WarmStart) { w.Registry = "another" }, "another registry"},
		{"truncated", func(t *testing.T, w *discovery.WarmStart) {
			data, err := os.ReadFile(w.Path)
			if err != nil {
				t.Fatal(err)
			}
			spoil(t, w, data[:len(data)-100])
		}, "cut off"},
		{"empty", func(t *testing.T, w *discovery.WarmStart) { spoil(t, w, nil) }, "cut off"},
		{"corrupt", func(t *testing.T, w *discovery.WarmStart) {
			data, err := os.ReadFile(w.Path)
			if err != nil {
				t.Fatal(err)
			}
			spoil(t, w, []byte(strings.Replace(string(data), "10.1.0.0", "10.1.0.9", 1)))
		}, "checksum"},
		{"something else", func(t *testing.T, w *discovery.WarmStart) { spoil(t, w, []byte("hello\n")) }, "does not begin"},
		{"a folder", func(t *testing.T, w *discovery.WarmStart) {
			if err := os.Remove(w.Path); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(w.Path, 0o700); err != nil {
				t.Fatal(err)
			}
		}, "no regular file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				file := warmFile(t)
				nodes := fleet(1)
				saveList(t, file, nodes...)
				test.spoil(t, &file)
				log, logs := newLog(slog.LevelWarn)
				m := unreachable()
				d := follow(t, m.Open(), discovery.Options{WarmStart: file, Probe: newNetwork(nodes...).probe, Logger: log})
				d.Restore()
				time.Sleep(time.Second)
				want := "n0:restored"
				if test.reason != "" {
					want = ""
					aside := logs.containing("set aside")
					if len(aside) != 1 || !strings.Contains(fmt.Sprint(aside[0].fields["error"]), test.reason) {
						t.Errorf("logged %v, want one line with %q", aside, test.reason)
					}
					if _, err := os.Stat(file.Path + ".bad"); err != nil {
						t.Error(err)
					}
				}
				expectStates(t, d, want, "restored")
				// Whatever there was, the next list is kept.
				m.Restore()
				reconnect(t, d)
				time.Sleep(5 * time.Second)
				if info, err := os.Stat(file.Path); err != nil || !info.Mode().IsRegular() {
					t.Errorf("the next list is not kept: %v", err)
				}
			})
		})
	}
}

func spoil(t *testing.T, w *discovery.WarmStart, data []byte) {
	t.Helper()
	if err := os.WriteFile(w.Path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Two on one host have a file each. Whoever starts reads the newest.
func TestListsOfTwoOnOneHost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := warmFile(t)
		nodes := fleet(3)
		m := discoverytest.NewMemory()
		write(m, nodes[0])
		once(t, m.Open(), discovery.Options{WarmStart: file}, func(*discovery.Directory) {
			time.Sleep(5 * time.Second)
			write(m, nodes[1])
			once(t, m.Open(), discovery.Options{WarmStart: file}, func(*discovery.Directory) {
				time.Sleep(5 * time.Second)
			})
			if _, err := os.Stat(strings.TrimSuffix(file.Path, ".json") + "-2.json"); err != nil {
				t.Error(err)
			}
			m.Break()
		})
		// The first one has stopped last, but knew nothing since the registry went.
		n := newNetwork(nodes...)
		d := follow(t, unreachable().Open(), discovery.Options{WarmStart: file, Probe: n.probe})
		d.Restore()
		time.Sleep(time.Second)
		expectStates(t, d, "n0:restored n1:restored", "restored")
		other := follow(t, unreachable().Open(), discovery.Options{WarmStart: file, Probe: n.probe})
		other.Restore()
		time.Sleep(time.Second)
		expectStates(t, other, "n0:restored n1:restored", "restored beside the first one")
	})
}

// A folder that cannot be written is a line in the log, and no more.
func TestFolderThatCannotBeWrittenIsOneLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		folder := t.TempDir()
		blocker := filepath.Join(folder, "file")
		if err := os.WriteFile(blocker, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		log, logs := newLog(slog.LevelWarn)
		m := discoverytest.NewMemory()
		write(m, newNode("a"))
		d := follow(t, m.Open(), discovery.Options{
			WarmStart: discovery.WarmStart{Path: filepath.Join(blocker, "x.json"), Registry: "test"}, Logger: log,
		})
		d.Restore()
		time.Sleep(time.Hour)
		if len(logs.containing("not kept")) != 1 || len(logs.all()) > 2 {
			t.Errorf("logged %v", logs.all())
		}
	})
}

// The disk fills up, and is emptied.
func TestListIsSavedOnceThereIsRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		file := warmFile(t)
		if err := os.MkdirAll(file.Path+".tmp/x", 0o700); err != nil { // in the way of the temporary file
			t.Fatal(err)
		}
		log, logs := newLog(slog.LevelWarn)
		m := discoverytest.NewMemory()
		write(m, newNode("a", discovery.KeyLease, "24h"))
		follow(t, m.Open(), discovery.Options{WarmStart: file, Logger: log})
		time.Sleep(10 * time.Minute)
		if len(logs.all()) != 1 {
			t.Errorf("logged %v, want one line", logs.all())
		}
		if err := os.RemoveAll(file.Path + ".tmp"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if _, err := os.Stat(file.Path); err != nil {
			t.Error(err)
		}
	})
}
