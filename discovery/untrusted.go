package discovery

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxClip is how many bytes of a stranger's text stand in a message.
const maxClip = 64

// Clip shortens what a stranger wrote for use in a message, where it is quoted: to
// 64 bytes, and never within a character.
func Clip(s string) string { return shorten(s, maxClip) }

func shorten(s string, most int) string {
	if len(s) <= most {
		return s
	}
	end := most
	for end > most-utf8.UTFMax+1 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end] + "…"
}

// RedactURL returns what may be shown of a text that is a URL, or was to be one: its scheme,
// and what follows user info, which may be a password or a token, as may a query. Where
// a password with "?" or "#" in it cannot be told from a query with "@", nothing is
// shown but the scheme.
func RedactURL(s string) string {
	const hidden = "…"
	scheme, rest, found := strings.Cut(s, "://")
	switch {
	case !found:
		scheme, rest = "", s
	case strings.Trim(strings.ToLower(scheme), "abcdefghijklmnopqrstuvwxyz+") == "":
		scheme += "://"
	case strings.ContainsAny(scheme, "?#"):
		return hidden
	default: // what stands before may be user info as well
		scheme, rest = hidden, s[strings.LastIndex(s, "://")+len("://"):]
	}
	user, query := strings.LastIndexByte(rest, '@'), strings.IndexAny(rest, "?#")
	if query >= 0 && query < user {
		return strings.TrimSuffix(scheme, hidden) + hidden
	}
	if query >= 0 {
		rest = rest[:query+1] + hidden
	}
	if user >= 0 {
		scheme, rest = strings.TrimSuffix(scheme, hidden)+hidden, rest[user:]
	}
	return scheme + rest
}

// PrintableLine makes of what strangers wrote one line that does nothing to a
// terminal: no control characters, and none that turn the direction of writing.
func PrintableLine(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}

// printable reports whether s is UTF-8 without control characters, which would
// otherwise reach logs, headers and terminals, and without what breaks a line there
// or turns the direction in which it is read
// (https://trojansource.codes).
func printable(s string) bool {
	if !utf8.ValidString(s) {
		return false
	}
	return !strings.ContainsFunc(s, func(r rune) bool {
		return unicode.IsControl(r) || r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069
	})
}

// visible returns what may be shown of an id or a key that was not accepted: what a
// terminal would obey, or a reader not see, is escaped, and too much of it cut off.
func visible(s string) string {
	s = shorten(s, 2*MaxID)
	if utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return s
	}
	quoted := strconv.Quote(s)
	return quoted[1 : len(quoted)-1]
}
