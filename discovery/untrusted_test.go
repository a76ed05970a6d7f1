package discovery

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestClip(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ in, want string }{
		{"", ""},
		{strings.Repeat("x", 64), strings.Repeat("x", 64)},
		{strings.Repeat("x", 65), strings.Repeat("x", 64) + "…"},
		{strings.Repeat("x", 63) + "é", strings.Repeat("x", 63) + "…"},
		{strings.Repeat("x", 62) + "日本", strings.Repeat("x", 62) + "…"},
		{strings.Repeat("x", 61) + "日本", strings.Repeat("x", 61) + "日…"},
		{strings.Repeat("x", 61) + "😀😀", strings.Repeat("x", 61) + "…"},
		{strings.Repeat("\x80", 100), strings.Repeat("\x80", 61) + "…"},
	} {
		if got := Clip(test.in); got != test.want {
			t.Errorf("Clip(%q) = %q, want %q", test.in, got, test.want)
		}
	}
}

// FuzzUntrusted holds what the rules about strangers' text promise of any text.
func FuzzUntrusted(f *testing.F) {
	f.Add("orders-1")
	f.Add(strings.Repeat("é", 300))
	f.Add("a\x1b[31m\u202eb\n\xff")
	f.Add("\u2000") // a space, and none that anybody sees
	f.Fuzz(func(t *testing.T, s string) {
		clipped := Clip(s)
		kept, cut := strings.CutSuffix(clipped, "…")
		if !strings.HasPrefix(s, kept) && clipped != s || len(clipped) > maxClip+len("…") {
			t.Errorf("Clip(%q) = %q", s, clipped)
		}
		if utf8.ValidString(s) && !utf8.ValidString(clipped) {
			t.Errorf("Clip(%q) = %q cuts within a character", s, clipped)
		}
		if len(s) <= maxClip && clipped != s || len(s) > maxClip && (!cut || len(kept) <= maxClip-utf8.UTFMax) {
			t.Errorf("Clip(%q) = %q keeps too little", s, clipped)
		}
		for what, shown := range map[string]string{"visible": visible(s), "PrintableLine": PrintableLine(s)} {
			if !utf8.ValidString(shown) || strings.ContainsFunc(shown, func(r rune) bool { return !unicode.IsPrint(r) && r != unicode.ReplacementChar }) {
				t.Errorf("%s(%q) = %q", what, s, shown)
			}
		}
	})
}
