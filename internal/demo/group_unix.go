//go:build unix

package main

import (
	"os/exec"
	"syscall"
)

// ownGroup keeps an interrupt at the terminal away from the command, so that
// it is the demo that decides in which order things end.
func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
