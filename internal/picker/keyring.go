package picker

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"hash"
	"sync"
)

// A Keyring makes the tokens of nodes: what a client keeps of its session. A token is
// the hash of a node's id under a secret, and a seal on that hash, by which a token of a
// node that is gone is told from one that somebody made up. Whoever lacks the secret
// learns nothing from it: neither the id, nor whether two tokens are of neighbours.
//
// It never changes, and may be used by many goroutines.
type Keyring struct {
	macs []*sync.Pool // of hash.Hash, one for each secret
}

// A hash of 128 bits keeps a billion nodes apart, and of 2^64 made-up seals one is right.
const (
	hashBytes = 16
	sealBytes = 8
	// TokenLength is that of every token.
	TokenLength = (hashBytes + sealBytes) * 4 / 3
)

// What is hashed begins with what it is for, so that no id can be made that has the hash
// of a seal.
const (
	ofNode = "caddy-discovery/session/node\x00"
	ofSeal = "caddy-discovery/session/seal\x00"
)

// NewKeyring returns a keyring whose tokens are made with the first of the secrets, and
// which knows those that are made with any of them. Without a secret everybody can make
// them.
func NewKeyring(secrets ...string) *Keyring {
	if len(secrets) == 0 {
		secrets = []string{""}
	}
	k := new(Keyring)
	for _, s := range secrets {
		k.macs = append(k.macs, &sync.Pool{New: func() any { return hmac.New(sha256.New, []byte(s)) }})
	}
	return k
}

// Token returns the token of a node.
func (k *Keyring) Token(id string) string { return k.token(0, id) }

func (k *Keyring) token(secret int, id string) string {
	mac := k.macs[secret].Get().(hash.Hash)
	defer k.macs[secret].Put(mac)
	var raw [hashBytes + sealBytes]byte
	var sum [sha256.Size]byte
	mac.Reset()
	mac.Write([]byte(ofNode))
	mac.Write([]byte(id))
	copy(raw[:hashBytes], mac.Sum(sum[:0]))
	copy(raw[hashBytes:], seal(mac, raw[:hashBytes], &sum))
	return base64.RawURLEncoding.EncodeToString(raw[:])
}

// seal returns the seal on the hash of a node.
func seal(mac hash.Hash, of []byte, sum *[sha256.Size]byte) []byte {
	mac.Reset()
	mac.Write([]byte(ofSeal))
	mac.Write(of)
	return mac.Sum(sum[:0])[:sealBytes]
}

// Authentic reports whether a token was made with one of the secrets, for whatever node.
func (k *Keyring) Authentic(token string) bool {
	var raw [hashBytes + sealBytes]byte
	if len(token) != TokenLength {
		return false
	}
	if n, err := base64.RawURLEncoding.Decode(raw[:], []byte(token)); err != nil || n != len(raw) {
		return false
	}
	var sum [sha256.Size]byte
	for _, pool := range k.macs {
		mac := pool.Get().(hash.Hash)
		same := hmac.Equal(seal(mac, raw[:hashBytes], &sum), raw[hashBytes:])
		pool.Put(mac)
		if same {
			return true
		}
	}
	return false
}
