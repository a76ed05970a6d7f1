package caddydiscovery

import (
	"os"
	"testing"

	"github.com/caddyserver/caddy/v2"

	"github.com/caddy-discovery/caddy-discovery/internal/freeport"
)

// A config that is only validated leaves no instance ID behind, and one that runs
// keeps that by which it is known.
func TestInstanceID(t *testing.T) {
	t.Setenv("XDG_DATA_HOME", t.TempDir())
	name, _ := newMemory(t)
	config := `{
		admin off
		persist_config off
		registrar {
			registry memory ` + name + `
		}
	}
	http://127.0.0.1:` + freeport.String(t) + ` {
		reverse_proxy {
			dynamic discovery {
				registry memory ` + name + `
				subset 3
			}
		}
	}`
	if err := validate(config); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(instanceFile()); err == nil {
		t.Error("validating wrote the instance ID")
	}
	before, err := instanceID()
	if err != nil {
		t.Fatal(err)
	}
	load(t, config)
	kept, err := caddy.InstanceID()
	if err != nil || kept.String() != before {
		t.Errorf("the instance ID is %v, was %s: %v", kept, before, err)
	}
	if after, err := instanceID(); after != before {
		t.Errorf("the instance ID was %s and is %s: %v", before, after, err)
	}
}
