package discovery_test

import (
	"context"
	"fmt"
	"time"

	"github.com/caddy-discovery/caddy-discovery/discovery"
	"github.com/caddy-discovery/caddy-discovery/discovery/discoverytest"
)

// A service lists itself for as long as a context lasts.
func ExampleRegistrar() {
	// That of a fleet is opened by a URL, see package registries.
	registry := discoverytest.NewMemory().Open()
	defer registry.Close()
	endpoint, err := discovery.ParseEndpoint("http://10.0.0.7:5001")
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, stop := context.WithCancel(context.Background()) // a service stops at a signal
	defer stop()
	registrar, err := discovery.NewRegistrar(registry, discovery.Node{
		ID:       "orders-1",
		Endpoint: endpoint,
		Metadata: map[string]string{discovery.KeyService: "orders", discovery.KeyZone: "eu-1"},
	}, discovery.RegistrarOptions{
		Heartbeat: 10 * time.Second,
		Drain:     new(10 * time.Millisecond),
		Ready:     func(context.Context) error { return nil }, // asks the service itself
		OnHeartbeat: func(err error) {
			fmt.Println("announced:", err)
			stop()
		},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("left:", registrar.Run(ctx))
	// Output:
	// announced: <nil>
	// left: <nil>
}

// A program follows the nodes of a service.
func ExampleDirectory() {
	memory := discoverytest.NewMemory()
	memory.Put("orders-1", []byte(`{"nodeId":"orders-1","endpoint":"http://10.0.0.7:5001","metadata":{"service":"orders"}}`))
	memory.Put("orders-2", []byte(`{"nodeId":"orders-2","endpoint":"http://10.0.0.8:5001","metadata":{"service":"orders"}}`))
	registry := memory.Open()
	defer registry.Close()

	directory := discovery.NewDirectory(registry, discovery.Options{})
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- directory.Run(ctx) }()
	<-directory.Synced() // what is seen before is not the whole fleet

	for {
		snapshot := directory.Snapshot()
		for _, e := range snapshot.Service("orders") {
			fmt.Println(e.Node.ID, e.State(), e.Address())
		}
		if snapshot.Node("orders-1").State() == discovery.StateDraining {
			break
		}
		memory.Put("orders-1", []byte(`{"nodeId":"orders-1","endpoint":"http://10.0.0.7:5001","metadata":{"service":"orders","state":"draining"}}`))
		<-snapshot.Superseded()
	}
	stop()
	<-ended
	// Output:
	// orders-1 up 10.0.0.7:5001
	// orders-2 up 10.0.0.8:5001
	// orders-1 draining 10.0.0.7:5001
	// orders-2 up 10.0.0.8:5001
}

// What a registry can do beyond watching and announcing is an interface of its own.
func ExampleAs() {
	registry := discoverytest.NewMemory().Open()
	defer registry.Close()
	operator, ok := discovery.As[discovery.Overrider](registry)
	if !ok {
		fmt.Println("keeps no overrides")
		return
	}
	err := operator.SetOverride(context.Background(), "orders-1", discovery.Override{State: discovery.StateDraining})
	overrides, _ := operator.Overrides(context.Background())
	fmt.Println(overrides["orders-1"], err)
	// Output: state draining <nil>
}

// What is wrong with a record is a word for programs, and a sentence for people.
func ExampleInvalidError() {
	_, err := discovery.ParseNode([]byte(`{"nodeId":"orders-1","endpoint":"ftp://10.0.0.7"}`))
	fmt.Println(discovery.FaultOf(err))
	fmt.Println(err)
	// Output:
	// endpoint
	// invalid endpoint "ftp://10.0.0.7": the scheme must be http or https
}
