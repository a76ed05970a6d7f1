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

// What a message shows of a URL. The comments say what four rules, now one, showed of it
// where they differed: those for endpoints, NATS URLs, Caddyfiles and Redis URLs.
func TestRedactURL(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ in, want string }{
		{"", ""},
		{"h:1", "h:1"},
		{"s3cr3t", "s3cr3t"},
		{"nats://h:4222", "nats://h:4222"},
		{"nats://u@h", "nats://…@h"},                              // …, nats://h, nats://…@h
		{"nats://u:p@h:4222/b", "nats://…@h:4222/b"},              // …, nats://h:4222/b, nats://…@h:4222/b
		{"u:p@h:1", "…@h:1"},                                      // …, h:1, …@h:1
		{"nats://u:p@ss@h", "nats://…@h"},                         // …, nats://h, nats://…@h
		{"nats://u:p/w@h", "nats://…@h"},                          // …, nats://h, nats://…@h
		{"nats://u:p?w@h", "nats://…"},                            // …, nats://h, nats://…@h
		{"nats://h?token=s", "nats://h?…"},                        // the same, nats://h, the same
		{"nats://h#s", "nats://h#…"},                              // the same, nats://h, the same
		{"nats://u:p@h?token=s", "nats://…@h?…"},                  // …, nats://h, nats://…@h?…
		{"nats://h?token=s@x", "nats://…"},                        // …, nats://x, nats://…@x
		{"h?token=s@x", "…"},                                      // …, x, …@x
		{"NATS+X://u:p@h", "NATS+X://…@h"},                        // …, NATS+X://h, NATS+X://…@h
		{"redis+sentinel://:p@h:1/0", "redis+sentinel://…@h:1/0"}, // likewise
		{"u:p://x@h", "…@h"},                                      // …, h, …@h, u:p
		{"u:p@h://x", "…x"},                                       // …, x, …@h://x, u:p@h
		{"h?token=s://x", "…"},
		{"p@ss://h?x", "…h?…"}, // …, h, …@ss://h?…, p@ss
	} {
		if got := RedactURL(test.in); got != test.want {
			t.Errorf("RedactURL(%q) = %q, want %q", test.in, got, test.want)
		}
	}
}

// FuzzUntrusted holds what the rules about strangers' text promise of any text.
func FuzzUntrusted(f *testing.F) {
	f.Add("orders-1")
	f.Add(strings.Repeat("é", 300))
	f.Add("a\x1b[31m\u202eb\n\xff")
	f.Add("a@b?c://d#e")
	f.Add("://")
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
		const secret = "hunter2"
		if !strings.Contains(s, secret) {
			for _, url := range []string{
				"redis://" + secret + "@" + s, "x:" + secret + "@" + s, "x\\y://" + secret + "@" + s, "nats://" + s + secret + "@h",
				"nats://h?" + secret + s, "h#" + s + secret, secret + "@" + s + "://h",
			} {
				if shown := RedactURL(url); strings.Contains(shown, secret) {
					t.Errorf("RedactURL(%q) = %q", url, shown)
				}
			}
			if redacted := RedactURL(s); RedactURL(redacted) != redacted {
				t.Errorf("RedactURL(%q) = %q, of which something is hidden", s, redacted)
			}
		}
		for what, shown := range map[string]string{"visible": visible(s), "PrintableLine": PrintableLine(s)} {
			if !utf8.ValidString(shown) || strings.ContainsFunc(shown, func(r rune) bool { return !unicode.IsPrint(r) && r != unicode.ReplacementChar }) {
				t.Errorf("%s(%q) = %q", what, s, shown)
			}
		}
	})
}
