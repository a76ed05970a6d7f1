package chrometest

import "syscall"

// diesWithParent makes the browser end with an aborted test.
func diesWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
