# `make help` lists what there is. Everything is built with the Go toolchain and
# the versions that go.mod pins; nothing has to be installed beforehand, except
# what the scripts/need-… say.

MODULE := github.com/caddy-discovery/caddy-discovery

# What the binary is made of: everything but tests, what they use, documents and
# the packages that are programs of their own.
SOURCES := $(shell find . \( -path './.*' -o -path ./bin -o -path ./benchmarks -o -path ./examples \
	-o -path ./integration -o -path ./internal/demo -o -path ./internal/freeport -o -path './internal/*test' \
	-o -path ./scripts -o -path ./tools -o -name testdata \) -prune \
	-o -type f ! -name '*_test.go' ! -name '*.md' ! -name Caddyfile.example ! -name LICENSE -print)

GOLANGCI_LINT := go tool -modfile=tools/golangci-lint/go.mod golangci-lint

ACTIONLINT := go tool -modfile=tools/actionlint/go.mod actionlint

TEST_TIMEOUT ?= 20m
FUZZ_TIME    ?= 30s
SOAK_FOR     ?= 10m
SOAK_SEED    ?= 0
SOAK_RELOADS ?= 1000
BENCH        ?= .
PKG          ?= ./...

.PHONY: build demo test test-clients test-deploy lint bench bench-backends bench-changes bench-hosts bench-proxy bench-peers bench-subsets bench-failing reliability edge-minute soak docs fuzz clean help
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: bin/caddy ## bin/caddy: Caddy with the plugin and the NATS server in the box

bin/caddy: WITH := --with $(MODULE)/embedded
bin/caddy-file: WITH := --with example.com/filebackend@v0.0.0 --replace example.com/filebackend=./examples/backend
bin/caddy-file: $(wildcard examples/backend/*.go examples/backend/go.*)

# v0.0.0 is no release. Asked for an exact version, Go takes the replacement
# whatever the module proxy answers; asked for none, it looks the module up
# first, and a proxy that refuses what it does not know ends the build.
bin/caddy bin/caddy-file: $(SOURCES)
	@mkdir -p bin
	@echo "building $@ (the first time takes some minutes)"
	@version=$$(go list -m -f '{{.Version}}' github.com/caddyserver/caddy/v2) && \
	go tool xcaddy build "$$version" --output $@ \
		--with $(MODULE)@v0.0.0 $(WITH) --replace $(MODULE)=. \
		>$@.log 2>&1 || { cat $@.log; exit 1; }
	@echo "built $@, Caddy $$($@ version | cut -d ' ' -f 1)"

demo: bin/caddy ## a fleet that joins, drains and crashes behind Caddy; DEMO_FOR=10s ends it
	@go build -o bin/demo ./internal/demo
	@bin/demo

test: ## all tests, with the race detector
	@scripts/need-redis
	@scripts/need-chromium
	@scripts/need-promtool
	go test -race -parallel 6 -timeout $(TEST_TIMEOUT) $(PKG)
	cd examples/backend && go test -race -timeout $(TEST_TIMEOUT) ./...

test-clients: bin/nats ## the example services in Node.js, Python and shell, on real registries behind the real binary
	@scripts/need-redis
	@scripts/need-clients
	cd examples/node-service && npm ci --no-audit --no-fund
	go test -count=1 -tags clients -timeout $(TEST_TIMEOUT) -run '^TestClients$$' ./integration

test-deploy: ## the unit of systemd, the image, the files of Compose and Kubernetes, the workflows, what the pages on moving show
	@scripts/need-systemd
	@scripts/need-nginx-haproxy
	cd tools/deploycheck && go test -count=1 ./...
	$(ACTIONLINT) -shellcheck= -pyflakes= .github/workflows/*.yml

# The command nats, for the example in shell.
bin/nats: tools/nats/go.mod
	@mkdir -p bin
	go build -modfile=tools/nats/go.mod -o $@ github.com/nats-io/natscli/nats

lint: ## formatting, vet, and the rules of .golangci.yml
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "gofmt would change:"; echo "$$unformatted"; exit 1; }
	go vet ./...
	cd examples/backend && go vet ./...
	$(GOLANGCI_LINT) run
	cd examples/backend && go tool -modfile=$(CURDIR)/tools/golangci-lint/go.mod golangci-lint run -c $(CURDIR)/.golangci.yml

bench: ## all benchmarks but those of bench-proxy, bench-peers and bench-failing; BENCH=<regexp> and PKG=<package> choose some
	@scripts/need-redis
	go test -run '^$$' -bench '$(BENCH)' -skip '^Benchmark(Proxy|Peers|AilingNode)$$' -benchmem -timeout 60m $(PKG)

bench-backends: ## compare the kinds of registry; writes docs/benchmarks.md
	@scripts/need-redis
	go test -run '^$$' -bench '^BenchmarkBackends$$' -benchtime 1x -timeout 30m ./benchmarks -args -report $(CURDIR)/docs

bench-changes: ## time changes that follow each other without a pause; writes docs/benchmarks.md
	go test -run '^$$' -bench '^BenchmarkBackToBack$$' -benchtime 1x -timeout 30m ./benchmarks -args -report $(CURDIR)/docs

bench-hosts: ## time the first answer by HTTPS for hosts that services bring along; writes docs/benchmarks.md
	go test -run '^$$' -bench '^BenchmarkNewHost$$' -benchtime 1x -timeout 30m ./benchmarks -args -report $(CURDIR)/docs

bench-subsets: ## simulate proxies that share a fleet; writes docs/benchmarks.md
	go test -run '^TestSimulatedFleets$$' -count 1 -timeout 60m ./internal/picker -subset-table $(CURDIR)/docs/benchmarks.md

bench-proxy: ## compare with static upstreams, nginx and HAProxy; writes docs/benchmarks.md
	@scripts/need-nginx-haproxy
	go test -run '^$$' -bench '^BenchmarkProxy$$' -benchtime 1x -timeout 60m ./benchmarks -args -report $(CURDIR)/docs

bench-peers: ## compare with Traefik over one Redis: TRAEFIK=<its binary>; writes docs/benchmarks.md
	@scripts/need-redis
	go test -run '^$$' -bench '^BenchmarkPeers$$' -benchtime 1x -timeout 30m ./benchmarks -args -traefik "$(abspath $(TRAEFIK))" -report $(CURDIR)/docs

bench-failing: ## one node of five that fails or is slow, beside nginx, HAProxy and Caddy's own; writes docs/benchmarks.md
	@scripts/need-nginx-haproxy
	go test -run '^$$' -bench '^BenchmarkAilingNode$$' -benchtime 1x -timeout 60m ./benchmarks -args -report $(CURDIR)/docs

.PHONY: simulate
simulate: ## compare the policies before uneven fleets, in virtual time; writes docs/balancing.md
	go test -count=1 -run '^TestSimulation$$' -v ./internal/simulation -args -report $(CURDIR)/docs

reliability: ## hurt every kind of registry under load; writes docs/reliability.md
	@scripts/need-redis
	go test -count=1 -parallel 6 -run '^TestFaults$$' -timeout 30m ./integration -args -reliability $(CURDIR)/docs/reliability.md

edge-minute: ## a WebSocket and a download of a minute, while a hundred services come and go with their hosts
	@scripts/need-redis
	go test -count=1 -v -run '^TestEdge$$' ./integration -args -streams 1m

soak: ## the random run for SOAK_FOR (10m), SOAK_SEED=<n> repeats one, and 1,000 reloads
	@scripts/need-redis
	go test -race -v -count=1 -run '^(TestRandomRun|TestManyReloads)$$' -timeout 24h ./integration \
		-args -for $(SOAK_FOR) -seed $(SOAK_SEED) -reloads $(SOAK_RELOADS)

docs: ## write the tables of docs/options.md from the Go documentation
	go test -count=1 -run '^TestOptions$$' ./docs -args -update

fuzz: ## every fuzz target for FUZZ_TIME (30s) each
	@scripts/fuzz $(FUZZ_TIME)

clean: ## remove what was built
	rm -rf bin .tmp
