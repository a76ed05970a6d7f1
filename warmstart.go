package caddydiscovery

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/discovery"
)

// warmStartOf returns where the directory of a registry keeps its last known list.
func warmStartOf(b Backend) (discovery.WarmStart, error) {
	settings, err := json.Marshal(b)
	if err != nil {
		return discovery.WarmStart{}, err
	}
	name, err := warmName(string(b.CaddyModule().ID), settings)
	if err != nil {
		return discovery.WarmStart{}, err
	}
	return discovery.WarmStart{
		Path:     filepath.Join(caddy.AppDataDir(), "discovery", name+".json"),
		Registry: name,
	}, nil
}

// warmName names the registry that settings lead to. It is a hash, but one that
// stands in a file's name: nothing that is secret goes into it, lest it be guessed
// from there. A list thus survives that a password is replaced, as it should.
func warmName(module string, settings []byte) (string, error) {
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
	sum := sha256.Sum256(append([]byte(module+" "), public...))
	return hex.EncodeToString(sum[:16]), nil
}

// isSecret reports whether a setting of this name may be, or lead to, a secret.
func isSecret(name string) bool {
	for _, word := range []string{"pass", "token", "secret", "cred", "nkey", "key_file", "tls_", "user", "auth"} {
		if strings.Contains(strings.ToLower(name), word) {
			return true
		}
	}
	return false
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

// scheduleRestore has the last known list used when half of sync_timeout has passed
// without a listing.
func (u *Upstreams) scheduleRestore() {
	u.restoring.Do(func() {
		u.restore = time.AfterFunc(time.Until(u.restoresAt()), u.directory.Restore)
	})
}

// restoresAt is when the last known list is used, unless the registry was listed.
func (u *Upstreams) restoresAt() time.Time {
	return time.Unix(0, u.directory.opened.Load()).Add(time.Duration(u.SyncTimeout) / 2)
}

// stopRestore ends what scheduleRestore began. Nobody calls that any more.
func (u *Upstreams) stopRestore() {
	u.restoring.Do(func() {})
	if u.restore != nil {
		u.restore.Stop()
	}
}
