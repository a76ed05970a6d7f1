package redis

import (
	"context"
	_ "embed" // for the scripts

	goredis "github.com/redis/go-redis/v9"
)

var (
	//go:embed announce.lua
	announceLua string
	//go:embed withdraw.lua
	withdrawLua string
	//go:embed look.lua
	lookLua string
	//go:embed own_key.lua
	ownKeyLua string
	//go:embed override.lua
	overrideLua string
	//go:embed overrides.lua
	overridesLua string
	//go:embed clock.lua
	clockLua string
	//go:embed history.lua
	historyLua string
	//go:embed record.lua
	recordLua string

	announceScript  = newScript(announceLua)
	withdrawScript  = newScript(withdrawLua)
	lookScript      = newScript(lookLua)
	ownKeyScript    = newScript(ownKeyLua)
	overrideScript  = newScript(overrideLua)
	overridesScript = newScript(overridesLua)
	clockScript     = newScript(clockLua)
	historyScript   = newScript(historyLua)
	recordScript    = newScript(recordLua)
)

type script struct {
	source string
	*goredis.Script
}

func newScript(source string) script { return script{source, goredis.NewScript(source)} }

// run runs the script by its digest, or in full if the server does not have it
// yet. It is for use within do.
func (s script) run(ctx context.Context, c goredis.Scripter, keys []string, args ...any) (any, error) {
	answer, err := s.Run(ctx, c, keys, args...).Result()
	return answer, explainScript(err, s.source)
}

// listOf returns the strings of a list that a script answered.
func listOf(answer any) []string {
	list, _ := answer.([]any)
	out := make([]string, len(list))
	for i := range list {
		out[i], _ = list[i].(string)
	}
	return out
}
