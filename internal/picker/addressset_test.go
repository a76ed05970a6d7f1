package picker

import (
	"fmt"
	"testing"
)

func TestAddressSet(t *testing.T) {
	if set := (*AddressSet)(nil); !set.Empty() {
		t.Error("no set has something in it")
	}
	var set AddressSet
	if !set.Empty() || set.Has("") {
		t.Error("a new set has something in it")
	}
	for i := range 100 {
		for range 2 {
			set.Add(fmt.Sprint("10.0.0.", i, ":80"))
		}
		for j := range 100 {
			if got := set.Has(fmt.Sprint("10.0.0.", j, ":80")); got != (j <= i) {
				t.Fatalf("with %d addresses: has number %d: %v", i+1, j, got)
			}
		}
		if set.Empty() || set.Has("") {
			t.Fatalf("with %d addresses: empty %v, has none %v", i+1, set.Empty(), set.Has(""))
		}
	}
	if len(set.many) != 100 {
		t.Errorf("it keeps %d addresses, want 100", len(set.many))
	}
}
