package discoverytest

import (
	"context"
	"syscall"
)

// Refuse is a probe for directories whose nodes are made up: nobody is there, and
// nobody is dialled to find out.
func Refuse(context.Context, string) error { return syscall.ECONNREFUSED }
