package redistest

import (
	_ "embed"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

//go:embed testdata/clock.c
var clockSource []byte

// A clock is that of one server, on Linux. Nothing ready-made does: libfaketime
// and the allocator that redis-server is linked with wait for each other.
type clock struct{ library, file string }

// Clock gives the server a time of day that [Server.SetClock] can change. It
// needs a C compiler, as the race detector does.
func Clock() Option {
	return func(s *Server) {
		s.t.Helper()
		dir := s.t.TempDir()
		source := filepath.Join(dir, "clock.c")
		s.clock = &clock{library: filepath.Join(dir, "clock.so"), file: filepath.Join(dir, "clock")}
		if err := os.WriteFile(source, clockSource, 0o600); err != nil {
			s.t.Fatal(err)
		}
		compiler := os.Getenv("CC")
		if compiler == "" {
			compiler = "cc"
		}
		if output, err := exec.Command(compiler, "-shared", "-fPIC", "-o", s.clock.library, source).CombinedOutput(); err != nil {
			s.t.Fatalf("compiling a clock for redis-server, which takes a C compiler: %v\n%s", err, output)
		}
		s.SetClock(0)
	}
}

// SetClock makes the clock of a server with [Clock] go ahead by so much, or
// behind, at once if it runs.
func (s *Server) SetClock(ahead time.Duration) {
	s.t.Helper()
	seconds := binary.NativeEndian.AppendUint64(nil, uint64(ahead/time.Second))
	// The server has the file open, so it must stay the same one.
	file, err := os.OpenFile(s.clock.file, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.WriteAt(seconds, 0); err != nil {
		s.t.Fatal(err)
	}
}

func (c *clock) environment() []string {
	return append(os.Environ(), "LD_PRELOAD="+c.library, "REDISTEST_CLOCK="+c.file)
}
