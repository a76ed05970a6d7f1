//go:build !unix

package main

import "os/exec"

// ownGroup does nothing: an interrupt ends the command and the demo together.
func ownGroup(*exec.Cmd) {}
