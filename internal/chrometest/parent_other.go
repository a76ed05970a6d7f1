//go:build !linux

package chrometest

import "syscall"

// diesWithParent cannot do here what it does on Linux.
func diesWithParent() *syscall.SysProcAttr { return nil }
