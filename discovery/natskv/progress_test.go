package natskv

import "testing"

// Whoever waits is told of each step, and what has been reached never goes back.
func TestProgress(t *testing.T) {
	t.Parallel()
	var p progress
	for _, step := range []struct {
		what  string
		do    func()
		moves bool
		want  position
	}{
		{"emit", func() { p.emitting(true) }, false, position{busy: true}},
		{"a message", func() { p.advance(&message{sequence: 5, number: 1}) }, true, position{reached: 5, number: 1}},
		{"the listing", func() { p.sync(9) }, true, position{synced: true, reached: 9, number: 1}},
		{"an older message", func() { p.advance(&message{sequence: 7, number: 2}) }, true, position{synced: true, reached: 9, number: 2}},
	} {
		_, moved := p.now()
		step.do()
		told := false
		select {
		case <-moved:
			told = true
		default:
		}
		if at, _ := p.now(); at != step.want || told != step.moves {
			t.Errorf("%s: at %+v, told: %t, want %+v, %t", step.what, at, told, step.want, step.moves)
		}
	}
}
