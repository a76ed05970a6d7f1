package redis

import (
	"context"
	"embed"
	"strings"

	goredis "github.com/redis/go-redis/v9"
)

//go:embed *.lua
var luaFiles embed.FS

// A script runs on the server, in one step.
type script struct {
	source string
	*goredis.Script
}

// newScript returns the script of a file, after those of which it uses the functions.
func newScript(files ...string) script {
	var source strings.Builder
	for _, name := range files {
		text, err := luaFiles.ReadFile(name)
		if err != nil {
			panic(err) // it is not in this package
		}
		source.Write(text)
	}
	return script{source.String(), goredis.NewScript(source.String())}
}

// run runs the script by its digest, or in full if the server does not have it
// yet. It is for use within do.
func (s script) run(ctx context.Context, c goredis.Scripter, keys []string, args ...any) (any, error) {
	answer, err := s.Run(ctx, c, keys, args...).Result()
	return answer, explainScript(err, s.source)
}

// listOf returns the elements of a list that a script answered; those of another type
// are zero.
func listOf[T any](answer any) []T {
	list := as[[]any](answer)
	out := make([]T, len(list))
	for i := range list {
		out[i] = as[T](list[i])
	}
	return out
}

// as returns an answer, or the zero value if it is of another type.
func as[T any](answer any) T {
	a, _ := answer.(T)
	return a
}

// own reads the answer of a script that leaves a record as it is that is not the
// caller's own, and then answers with a negative number.
func own(answer any, err error) (bool, error) {
	n, ok := answer.(int64)
	return err == nil && ok && n >= 0, err
}
