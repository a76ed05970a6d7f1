package natskv_test

import (
	"fmt"
	"log"

	"github.com/caddy-discovery/caddy-discovery/discovery/natsconn"
	"github.com/caddy-discovery/caddy-discovery/discovery/natskv"
)

func ExampleOpen() {
	registry, err := natskv.Open(natskv.Config{
		URLs:   []string{"nats://10.0.0.5", "nats://10.0.0.6"},
		Conn:   natsconn.Options{Credentials: "/etc/orders/nats.creds"},
		Bucket: "fleet",
	})
	if err != nil {
		log.Fatal(err)
	}
	defer registry.Close()
	fmt.Println(registry)
	// Output: nats_kv://10.0.0.5:4222,10.0.0.6:4222/fleet
}
