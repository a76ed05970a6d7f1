// Package chancetest tells chance from mistakes, in tests of what is drawn.
package chancetest

import (
	"math"
	"testing"
)

// Check fails the test if the counts differ from what was expected by more than
// chance explains: Pearson's chi-square, beyond five standard deviations. It reports
// whether they do not.
func Check(t testing.TB, what string, counts map[string]int, expected map[string]float64) bool {
	t.Helper()
	for k, n := range counts {
		if expected[k] == 0 {
			t.Errorf("%s: %s came %d times and never should", what, k, n)
			return false
		}
	}
	x, degrees := 0.0, float64(len(expected)-1)
	for k, e := range expected {
		d := float64(counts[k]) - e
		x += d * d / e
	}
	if x > degrees+5*math.Sqrt(2*degrees) {
		t.Errorf("%s: chi-square %.1f with %.0f degrees of freedom: %v, want %v", what, x, degrees, counts, expected)
		return false
	}
	return true
}
