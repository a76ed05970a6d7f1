// Package systemload gives a node the load of the machine that it runs on. It is apart
// from package discovery because of what it depends on.
package systemload

import (
	"runtime"

	"github.com/shirou/gopsutil/v4/load"
)

// PerCore returns the load average of the last minute per core, 0 where the system does
// not tell. It fits [github.com/caddy-discovery/caddy-discovery/discovery.RegistrarOptions].Load.
func PerCore() float64 {
	avg, err := load.Avg()
	if err != nil {
		return 0
	}
	return avg.Load1 / float64(runtime.NumCPU())
}
