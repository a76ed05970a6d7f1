package redis

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/certtest"
)

func TestResolveSpellings(t *testing.T) {
	for _, spellings := range [][]Config{
		{
			{},
			{URLs: []string{"redis://127.0.0.1"}},
			{URLs: []string{"REDIS://127.0.0.1:6379/0"}, Mode: ModeSingle, Key: DefaultKey, Layout: LayoutSortedSet},
			{URLs: []string{"redis://[::ffff:127.0.0.1]:6379/"}, Poll: time.Second, History: 10, Protocol: 3},
		},
		{
			{URLs: []string{"rediss://me:s3cret@Example.com/3"}},
			{URLs: []string{"rediss://example.com:6379"}, Username: "me", Password: "s3cret", DB: 3},
			{URLs: []string{"rediss://me:s3cret@example.com"}, DB: 3, Username: "me"},
		},
		{
			{URLs: []string{"redis+cluster://b", "redis+cluster://a:7000", "redis+cluster://b"}},
			{URLs: []string{"redis://a:7000", "redis://b:6379"}, Mode: ModeCluster},
		},
		{
			{URLs: []string{"redis+sentinel://:pw@a/2"}},
			{URLs: []string{"redis://a:26379"}, Mode: ModeSentinel, Password: "pw", DB: 2, SentinelMaster: "mymaster"},
		},
		{
			{Layout: LayoutKeys},
			{Layout: LayoutKeys, Key: "catga:nodes:"},
		},
		{
			{URLs: []string{"rediss+sentinel://a"}},
			{URLs: []string{"rediss://a"}, Mode: ModeSentinel, SentinelTLS: TLSOn},
		},
		{
			{URLs: []string{"redis+sentinel://a"}, SentinelTLS: TLSOn, TLSServerName: "a"},
			{URLs: []string{"redis://a"}, Mode: ModeSentinel, SentinelTLS: TLSOn, TLSServerName: "a"},
		},
		{
			{URLs: []string{"rediss+cluster://a"}},
			{URLs: []string{"rediss://a"}, Mode: ModeCluster},
		},
	} {
		want, err := spellings[0].Resolve()
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range spellings {
			got, err := c.Resolve()
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%+v resolves to %#v, %v, want %#v", c.URLs, got, err, want)
			}
			again, err := got.Resolve()
			if err != nil || !reflect.DeepEqual(again, got) {
				t.Errorf("resolved twice: %#v, %v", again, err)
			}
		}
	}
}

func TestResolveRefuses(t *testing.T) {
	const secret = "hunter2"
	for name, c := range map[string]struct {
		config Config
		want   string
	}{
		"scheme":           {Config{URLs: []string{"nats://a"}}, "want redis://"},
		"no scheme":        {Config{URLs: []string{"hunter2"}}, "want redis://"},
		"two schemes":      {Config{URLs: []string{"redis+cluster://a", "redis+sentinel://b"}}, "same scheme"},
		"mode by scheme":   {Config{URLs: []string{"redis+cluster://a"}, Mode: ModeSentinel}, "contradicts"},
		"mode":             {Config{Mode: "ring"}, "single, sentinel, cluster"},
		"layout":           {Config{Layout: "list"}, "sorted_set, keys"},
		"two servers":      {Config{URLs: []string{"redis://a", "redis://b"}}, "mode sentinel or cluster"},
		"unescaped":        {Config{URLs: []string{"redis://me:hunter2/x@a"}}, "must be escaped"},
		"bad escape":       {Config{URLs: []string{"redis://me:hunter2%zz@a"}}, "must be escaped"},
		"hosts":            {Config{URLs: []string{"redis+sentinel://a,b"}}, "URL of its own"},
		"port":             {Config{URLs: []string{"redis://a:99999"}}, "65535"},
		"no host":          {Config{URLs: []string{"redis://:6379"}}, "host is missing"},
		"path":             {Config{URLs: []string{"redis://:hunter2@a/fleet"}}, "number"},
		"query":            {Config{URLs: []string{"redis://:hunter2@a?x=hunter2"}}, "query"},
		"other password":   {Config{URLs: []string{"redis://:hunter2@a"}, Password: "x"}, "password"},
		"other passwords":  {Config{URLs: []string{"redis+cluster://:hunter2@a", "redis+cluster://:hunter3@b"}}, "password"},
		"other db":         {Config{URLs: []string{"redis://a/1"}, DB: 2}, "db"},
		"cluster db":       {Config{URLs: []string{"redis+cluster://a/1"}}, "only database 0"},
		"negative db":      {Config{DB: -1}, "from 0"},
		"name only":        {Config{Username: "me"}, "needs a password"},
		"sentinel tls":     {Config{SentinelTLS: TLSOn}, "mode sentinel"},
		"sentinel maybe":   {Config{URLs: []string{"redis+sentinel://a"}, SentinelTLS: "maybe"}, "on, off"},
		"tls for nobody":   {Config{URLs: []string{"redis+sentinel://a"}, SentinelTLS: TLSOff, TLSServerName: "x"}, "rediss+sentinel"},
		"sentinel options": {Config{SentinelPassword: secret}, "mode sentinel"},
		"key":              {Config{Key: "a\nb"}, "control"},
		"long key":         {Config{Key: strings.Repeat("k", 2000)}, "1024"},
		"brace":            {Config{Key: "a}b"}, "hash tag"},
		"empty tag":        {Config{Key: "a{}b"}, "hash tag"},
		"empty prefix":     {Config{Key: ":", Layout: LayoutKeys}, "1 to"},
		"poll":             {Config{Poll: -time.Second}, "poll"},
		"history":          {Config{History: -1}, "history"},
		"protocol":         {Config{Protocol: 4}, "2 or 3"},
		"name":             {Config{Name: "a b"}, "name"},
		"half a pair":      {Config{TLSCert: "x"}, "key"},
		"no file":          {Config{TLSCA: "/nowhere/ca.pem"}, "tls_ca"},
		"no pair":          {Config{TLSCert: "/nowhere/c", TLSKey: "/nowhere/k"}, "tls_client_auth"},
	} {
		_, err := Open(c.config)
		wantError(t, err, discovery.ErrInvalid)
		if err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %q, want %q in it", name, err, c.want)
		}
		if err != nil && strings.Contains(err.Error(), secret) {
			t.Errorf("%s: error %q tells the password", name, err)
		}
	}
	garbage := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(garbage, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Open(Config{TLSCA: garbage})
	wantError(t, err, discovery.ErrInvalid)
}

func TestNames(t *testing.T) {
	certs := certtest.New(t)
	for _, c := range []struct {
		config    Config
		want      string
		addresses string
	}{
		{Config{}, "redis://127.0.0.1:6379/0/catga:nodes", "[127.0.0.1:6379]"},
		{Config{URLs: []string{"redis://me:s3cret@[2001:db8::1]/3"}, Layout: LayoutKeys}, "redis://[2001:db8::1]:6379/3/catga:nodes:*", "[[2001:db8::1]:6379]"},
		{Config{TLSCA: certs.CA}, "rediss://127.0.0.1:6379/0/catga:nodes", "[127.0.0.1:6379]"},
		{
			Config{URLs: []string{"redis+sentinel://b", "redis+sentinel://:s3cret@a"}, SentinelPassword: "s3cret"},
			"redis+sentinel://a:26379,b:26379/mymaster/0/catga:nodes", "[a:26379 b:26379]",
		},
		{Config{URLs: []string{"rediss+cluster://a:7000"}, Password: "s3cret"}, "rediss+cluster://a:7000/0/catga:nodes", "[a:7000]"},
	} {
		r := openRegistry(t, c.config)
		if got := r.String(); got != c.want {
			t.Errorf("String is %q, want %q", got, c.want)
		}
		if got := fmt.Sprint(c.config.Addresses()); got != c.addresses {
			t.Errorf("Addresses are %s, want %s", got, c.addresses)
		}
		for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
			if got := fmt.Sprintf(verb, c.config); strings.Contains(got, "s3cret") {
				t.Errorf("%s tells the password: %s", verb, got)
			}
		}
	}
	if got := (Config{Mode: "x"}).Addresses(); got != nil {
		t.Errorf("an invalid configuration has the addresses %v", got)
	}
}

func TestSideKeysShareTheSlot(t *testing.T) {
	for key, want := range map[string]string{
		"catga:nodes":    "{catga:nodes}:changes",
		"catga:nodes:":   "{catga:nodes:}:changes",
		"a{tag}b":        "a{tag}b:changes",
		"a{b":            "{a{b}:changes",
		"{fleet}:nodes:": "{fleet}:nodes::changes",
	} {
		c, err := Config{Key: key}.Resolve()
		if err != nil {
			t.Fatal(err)
		}
		if got := c.side("changes"); got != want {
			t.Errorf("the stream of %q is %q, want %q", key, got, want)
		}
	}
}

func TestGlob(t *testing.T) {
	if got, want := escapeGlob(`a*b?[c]\`), `a\*b\?\[c\]\\`; got != want {
		t.Errorf("escaped %s, want %s", got, want)
	}
}
