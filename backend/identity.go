package backend

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/url"
	"slices"
	"strings"
)

// publicName names the registry that a backend leads to. It is a hash, but one that
// stands in a file's name: nothing that is secret goes into it, lest it be guessed
// from there. A saved list thus survives that a password is replaced, as it should.
func publicName(b Backend) (string, error) {
	settings, err := json.Marshal(b)
	if err != nil {
		return "", err
	}
	var fields map[string]any
	if err := json.Unmarshal(settings, &fields); err != nil {
		return "", err
	}
	for name, value := range fields {
		if isSecret(name) {
			delete(fields, name)
			continue
		}
		if values, ok := value.([]any); ok {
			for i := range values {
				values[i] = withoutUserInfo(values[i])
			}
			continue
		}
		fields[name] = withoutUserInfo(value)
	}
	// How a list is used does not change what is listed.
	for _, name := range []string{"ttl", "loss_guard", "warm_start"} {
		delete(fields, name)
	}
	public, err := json.Marshal(fields)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(append([]byte(b.CaddyModule().ID+" "), public...))
	return hex.EncodeToString(sum[:16]), nil
}

// isSecret reports whether a setting of this name may be, or lead to, a secret.
func isSecret(name string) bool {
	words := []string{"pass", "token", "secret", "cred", "nkey", "key_file", "tls_", "user", "auth"}
	return slices.ContainsFunc(words, func(word string) bool { return strings.Contains(strings.ToLower(name), word) })
}

func withoutUserInfo(value any) any {
	s, ok := value.(string)
	if !ok || !strings.Contains(s, "@") {
		return value
	}
	u, err := url.Parse(s)
	if err != nil {
		return ""
	}
	u.User = nil
	return u.String()
}
