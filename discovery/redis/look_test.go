package redis

import (
	"fmt"
	"math"
	"slices"
	"testing"

	goredis "github.com/redis/go-redis/v9"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/internal/redistest"
)

// A look reads the newest members, each once, no more than it may, and with few
// questions, however scores are shared.
func TestLookIsBounded(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	ctx, c := t.Context(), s.Client()
	const most = 6000
	for name, test := range map[string]struct {
		members int
		score   func(i int) float64 // rises
		lowest  string
		known   []any // a score and how many have it
		user    []string
		want    int // of the newest
	}{
		"one score":          {members: most, score: func(int) float64 { return 7 }, want: most},
		"one score, more":    {members: 2 * most, score: func(int) float64 { return 7 }, want: most},
		"few scores":         {members: most, score: func(i int) float64 { return float64(i / 700) }, want: most},
		"few scores, more":   {members: 2 * most, score: func(i int) float64 { return float64(i / 700) }, want: most},
		"own scores":         {members: 2 * most, score: func(i int) float64 { return float64(i) }, want: most},
		"without end":        {members: most + 10, score: func(i int) float64 { return math.Inf(i - 1000) }, want: most},
		"many, and newer":    {members: 2 * most, score: func(i int) float64 { return float64(i / (2*most - 5)) }, want: most},
		"old and known":      {members: 2 * most, score: func(i int) float64 { return float64(min(i, 1)) }, known: []any{"0", 1}, want: most},
		"in part":            {members: 2 * most, score: func(int) float64 { return 7e12 }, lowest: "5", want: most},
		"in part, but a few": {members: 2 * most, score: func(i int) float64 { return float64(i) }, lowest: fmt.Sprint(2*most - 10), want: 10},
		"without ranks":      {members: 2 * most, score: func(i int) float64 { return float64(i / 700) }, user: []string{"+zrangebyscore", "+zcard"}, want: most},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.FlushAll(ctx).Err(); err != nil {
				t.Fatal(err)
			}
			var all []goredis.Z
			for i := range test.members {
				all = append(all, goredis.Z{Score: test.score(i), Member: fmt.Sprintf("m%06d", i)})
			}
			for chunk := range slices.Chunk(all, 5000) {
				if err := c.ZAdd(ctx, "set", chunk...).Err(); err != nil {
					t.Fatal(err)
				}
			}
			lowest := "-inf"
			if test.lowest != "" {
				lowest = test.lowest
			}
			reader := c
			if test.user != nil {
				rights := append([]string{"reset", "on", "nopass", "~*", "-@all", "+@connection", "+eval", "+evalsha", "+time"}, test.user...)
				if err := c.ACLSetUser(ctx, "narrow", rights...).Err(); err != nil {
					t.Fatal(err)
				}
				reader = goredis.NewClient(&goredis.Options{Addr: s.Addr(), Username: "narrow", Password: "any"})
				defer func() { _ = reader.Close() }()
			}
			before, _ := calls(t, c, "zrangebyscore")
			args := append([]any{lowest, "0", discovery.MaxRecord, maxRead, usualRecord, most}, test.known...)
			answer, err := lookScript.run(ctx, reader, []string{"set"}, args...)
			if err != nil {
				t.Fatal(err)
			}
			l := &setLook{long: make(longMembers)}
			for i := 0; i < len(test.known); i += 2 {
				l.known = append(l.known, test.known[i].(string))
			}
			if err := l.read(answer); err != nil {
				t.Fatal(err)
			}
			var want []string
			for _, z := range all[test.members-test.want:] {
				want = append(want, z.Member.(string))
			}
			var got []string
			for _, m := range l.members {
				got = append(got, m.text)
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("%d members were read, want the newest %d", len(got), test.want)
			}
			after, _ := calls(t, c, "zrangebyscore")
			// Where many share a score the server walks past all of them each time.
			if n := after - before; test.score(0) == test.score(test.members-1) && n > 6 {
				t.Errorf("%d questions for one score, want no more than by doubling", n)
			}
		})
	}
}
