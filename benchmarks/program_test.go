package benchmarks

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A program is a running process, and the processes that it started.
type program struct {
	pids []int
}

// startProgram starts a command, which ends by a signal with the benchmark, and
// also if the benchmark is aborted.
func startProgram(b *testing.B, cmd *exec.Cmd, end syscall.Signal) *program {
	b.Helper()
	// The signal is tied to the thread that starts the process
	// (https://go.dev/issue/27505), so that thread must live as long.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: end}
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		_ = cmd.Wait()
		close(ended)
	}()
	if err := <-started; err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Signal(end)
		<-ended
	})
	return &program{pids: []int{cmd.Process.Pid}}
}

// adopt counts the processes that the program has started by now as its own.
func (p *program) adopt(b *testing.B) {
	b.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		b.Fatal(err)
	}
	for _, file := range stats {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			b.Fatal(err)
		}
		stat, err := readStat(pid)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // it has ended meanwhile
		} else if err != nil {
			b.Fatal(err)
		}
		if stat[statParent] == strconv.Itoa(p.pids[0]) {
			p.pids = append(p.pids, pid)
		}
	}
}

// Fields of /proc/<pid>/stat, counted from behind the name, which may contain
// anything.
const (
	statParent = 1
	statUser   = 11
	statSystem = 12
)

func readStat(pid int) ([]string, error) {
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return nil, err
	}
	text := string(stat)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) <= statSystem {
		return nil, fmt.Errorf("/proc/%d/stat says %q", pid, text)
	}
	return fields, nil
}

// cpu returns the processor time that the program has used, of all its threads, in
// user and in kernel mode. The kernel tells it in steps of 10 ms.
func (p *program) cpu(b *testing.B) time.Duration {
	b.Helper()
	const tick = time.Second / 100 // USER_HZ, the same on every Linux
	total := time.Duration(0)
	for _, pid := range p.pids {
		stat, err := readStat(pid)
		if err != nil {
			b.Fatal(err)
		}
		for _, field := range []int{statUser, statSystem} {
			ticks, err := strconv.ParseInt(stat[field], 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			total += time.Duration(ticks) * tick
		}
	}
	return total
}

// memory returns the resident memory of the program, in bytes.
func (p *program) memory(b *testing.B) int64 {
	b.Helper()
	total := int64(0)
	for _, pid := range p.pids {
		total += residentMemory(b, pid)
	}
	return total
}

// residentMemory returns the memory of a process, in bytes.
func residentMemory(b *testing.B, pid int) int64 {
	b.Helper()
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
			if err != nil {
				b.Fatal(err)
			}
			return kib << 10
		}
	}
	b.Fatal("the kernel does not tell the memory of a process")
	return 0
}

// loadAverage returns how many threads have wanted a processor in the last minute.
func loadAverage(b *testing.B) string {
	b.Helper()
	averages, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		b.Fatal(err)
	}
	first, _, _ := strings.Cut(string(averages), " ")
	return first
}
