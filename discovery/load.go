package discovery

import (
	"runtime"

	"github.com/shirou/gopsutil/v4/load"
)

// SystemLoad returns the load average of the last minute per core, 0 where the
// system does not tell.
func SystemLoad() float64 {
	avg, err := load.Avg()
	if err != nil {
		return 0
	}
	return avg.Load1 / float64(runtime.NumCPU())
}
