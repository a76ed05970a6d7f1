package systemload

import (
	"math"
	"testing"
)

func TestPerCoreIsALoad(t *testing.T) {
	if got := PerCore(); got < 0 || math.IsNaN(got) || math.IsInf(got, 0) {
		t.Errorf("load %v", got)
	}
}
