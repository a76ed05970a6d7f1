package natspubsub_test

import (
	"fmt"
	"log"

	"github.com/caddy-discovery/caddy-discovery/discovery/natspubsub"
)

func ExampleOpen() {
	registry, err := natspubsub.Open(natspubsub.Config{URLs: []string{"nats+pubsub://10.0.0.5/catga.nodes"}})
	if err != nil {
		log.Fatal(err)
	}
	defer registry.Close()
	fmt.Println(registry)
	// Output: nats+pubsub://10.0.0.5:4222/catga.nodes
}
