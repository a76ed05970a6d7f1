// Command events is a Caddy that runs a command when a node leaves. It shows how
// to listen to the plugin's events; handler.go is all that is its own. Start it in
// this folder:
//
//	go run . run
package main

import (
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	_ "github.com/caddyserver/caddy/v2/modules/standard"

	_ "github.com/caddy-discovery/caddy-discovery"
)

func main() { caddycmd.Main() }
