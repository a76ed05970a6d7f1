package redistest

import "syscall"

// dieWithParent makes the kernel end the server when the thread that started it
// ends, so that an aborted test leaves nothing behind.
func dieWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
