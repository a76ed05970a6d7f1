package redis

import (
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
	//go:embed withdraw_key.lua
	withdrawKeyLua string

	announceScript    = goredis.NewScript(announceLua)
	withdrawScript    = goredis.NewScript(withdrawLua)
	lookScript        = goredis.NewScript(lookLua)
	withdrawKeyScript = goredis.NewScript(withdrawKeyLua)
)
