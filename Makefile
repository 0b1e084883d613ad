# `make` alone lists the commands.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help install run migrate lint format check test tools lock reference contract clients clean bench \
	bench-peers bench-read bench-bulk bench-changes bench-commands bench-workers bench-citus test-changes test-pythons test-crash test-crossing test-failover test-upgrade test-hostile test-timing test-pooler test-citus test-citus-load test-go audit sbom

# The tests start hundreds of processes, each of which would compile the service again.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CLIENT := clients/python
BUILD_INPUTS := pyproject.toml $(CLIENT)/pyproject.toml $(CLIENT)/hatch_build.py $(wildcard protos/*/*/*.proto)
# Not the programs that somebody tries in the checkout, such as the README's hello.py.
SOURCES := alembic bench clients deploy examples service tests tools
NODE := tests/e2e/node
TYPESCRIPT := clients/typescript
ENGINES := tests/engines
# What `make check` runs besides lint: the unit tests, and at least one file of each layer above them.
CHECKED := tests/unit $(addprefix tests/integration/test_,user_repository.py post_repository.py repository.py \
	idempotency.py bulk_repository.py) \
	$(addprefix tests/e2e/test_,users.py posts.py lists.py bulk_create.py bulk_update.py bad_input.py)
PATRONI_LOCK := tests/support/patroni.lock
GRPCURL := v1.9.4
LOCK := uv pip compile pyproject.toml --quiet $(if $(UPGRADE),--upgrade) --universal \
	--generate-hashes --no-emit-package roster-client --no-header --no-emit-index-url --no-emit-find-links

# The first suitable Python; `make PYTHON=/path/to/python3 …` selects another one.
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach python,python3 python3.14 python3.13 python3.12 python3.11,\
	$(shell $(python) -c '$(SUITABLE)' 2>/dev/null && echo $(python))))

help: ## List these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(VENV)/installed ## Install the service into .venv

run: install ## Install, then serve on 127.0.0.1:50051 with the data in roster.db
	@exec $(BIN)/roster serve

migrate: install ## Upgrade the database schema to this release
	@$(BIN)/roster migrate

lint: $(VENV)/development ## Check format, style and types
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/mypy --python-version 3.10 $(CLIENT)/src $(CLIENT)/examples

format: $(VENV)/development ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix-only $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

check: lint ## Check format, style, types, the unit tests and a part of the others on SQLite, in a minute
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -k 'not postgresql' $(CHECKED)

test: lint tools ## Run all tests, on SQLite and on a PostgreSQL server of their own; takes ten minutes
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-crash: $(VENV)/development ## Test loads through crashes for 10 minutes; SECONDS=3600 for an hour
	SECONDS=$(or $(SECONDS),600) $(BIN)/python -m tests.faults.soak

test-changes: $(VENV)/development ## Build mirrors from the change feed in 200 random histories, some with crashes, and catch wrong feeds, in 35 minutes; HISTORIES=20
	HISTORIES=$(or $(HISTORIES),200) $(BIN)/python -m tests.faults.changes.soak

test-crossing: $(VENV)/development ## Load posts and delete their authors at the same time, for a minute; SECONDS=600
	ROSTER_TEST_CROSSING=$(or $(SECONDS),60) $(BIN)/python -m pytest --capture=no tests/faults/test_crossing.py

test-failover: $(VENV)/development .tools/failover/unpacked .tools/patroni/installed ## Fail over ten times to a standby, ten times by Patroni behind HAProxy, during a migration and a watch, in 16 minutes; ROUNDS=2
	ROSTER_TEST_FAILOVERS=$(or $(ROUNDS),10) $(BIN)/python -m pytest --capture=no --timeout 300 tests/faults/test_failover.py tests/faults/test_migration_failover.py tests/faults/test_feed_failover.py

test-upgrade: $(VENV)/development ## Upgrade from the previous release under traffic, by stopping servers and by killing them; ROUNDS=10
	ROSTER_TEST_UPGRADES=$(or $(ROUNDS),3) $(BIN)/python -m pytest tests/e2e/test_two_releases.py tests/integration/test_migration_faults.py

test-hostile: $(VENV)/development ## Attack a server for half an hour; SCALE=3 for attacks three times as large as in `make test`
	ROSTER_TEST_SCALE=$(or $(SCALE),10) $(BIN)/python -m pytest tests/e2e/hostile --timeout 1800

test-timing: $(VENV)/development ## Check that response times of VerifyPassword do not reveal which users exist; takes minutes
	$(BIN)/python -m pytest --capture=no tests/e2e/timing_of_passwords.py

test-pooler: $(VENV)/development tools ## Run the tests that use PostgreSQL through a PgBouncer in transaction mode with 4 connections
	ROSTER_TEST_POOLER=transaction $(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/integration tests/e2e tests/faults

test-citus: $(VENV)/development tools ## Run the tests that use PostgreSQL on the Citus cluster whose coordinator ROSTER_TEST_CITUS_URL names
	@test -n "$$ROSTER_TEST_CITUS_URL" || { \
		echo 'make: set ROSTER_TEST_CITUS_URL to a database of the coordinator, such as' \
			'postgresql://postgres@127.0.0.1:5432/citus, that has the extension citus and its workers registered' \
			'(the tests create databases roster_test_… on all nodes, under the names of pg_dist_node)' >&2; exit 1; }
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/integration tests/e2e tests/faults

test-citus-load: $(VENV)/development ## Load ROWS=1000000 posts into that cluster while the server is killed, and a worker by KILL_WORKER='a command that kills and starts it'
	ROWS='$(ROWS)' KILL_WORKER='$(KILL_WORKER)' $(BIN)/python -m tests.faults.citus_load

test-pythons: $(VENV)/development ## Install the Python client in each Python from 3.10 to 3.14 on PATH, and run its examples; PYTHONS='/path/to/python3.10 …'
	ROSTER_TEST_PYTHONS="$(or $(PYTHONS),$(shell for n in 10 11 12 13 14; do python3.$$n -c '' 2>/dev/null && echo python3.$$n; done))" \
		$(BIN)/python -m pytest tests/e2e/test_client_package.py

audit: $(VENV)/development ## Check the pinned dependencies for known vulnerabilities; needs the network
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

sbom: $(VENV)/development ## Write the pinned dependencies with their hashes to dist/roster.cdx.json (CycloneDX)
	@mkdir -p dist
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file dist/roster.cdx.json requirements.lock

test-go: $(VENV)/development ## Run the Go client, and the Go programs of docs/calling.md and examples/changes; needs Go, and a minute the first time
	ROSTER_TEST_GO=1 $(BIN)/python -m pytest tests/e2e/test_languages.py tests/e2e/test_calling.py tests/e2e/test_change_consumers.py --timeout 600

tools: .tools/grpcurl-$(GRPCURL) .tools/pgbouncer/unpacked $(NODE)/node_modules/.package-lock.json $(TYPESCRIPT)/dist/index.js .tools/generators-for-go $(ENGINES)/node_modules/.package-lock.json ## Install grpcurl, PgBouncer, the clients for Node, and PostgreSQL 14 to 18, which some tests use

lock: ## Resolve and pin the dependencies; UPGRADE=1 takes the newest versions; needs uv
	@command -v uv >/dev/null || { echo 'make: uv is not on PATH: pip install uv' >&2; exit 1; }
	$(LOCK) --group build --output-file requirements.lock
	$(LOCK) --group build --extra tracing --constraint requirements.lock --output-file deploy/requirements.lock
	$(LOCK) --group dev --all-extras --constraint requirements.lock --output-file requirements-dev.lock
	$(subst pyproject.toml,tests/support/patroni.in --python-version 3.11,$(LOCK)) --no-annotate --output-file $(PATRONI_LOCK)

reference: $(VENV)/development ## Generate docs/reference.md from the protos
	$(BIN)/python -m tools.contract_reference docs/reference.md

clients: $(VENV)/development $(TYPESCRIPT)/node_modules/.package-lock.json ## Generate the code of the clients in Go and TypeScript from the protos; needs Go and npm
	$(BIN)/python -m tools.generate_clients .

contract: $(VENV)/development ## Record the protos as released; later versions are compared with them
	$(BIN)/python -m tools.contract_image protos/released.binpb

clean: ## Remove installed, generated and cached files; data is kept
	rm -rf $(VENV) .bench .tools dist $(NODE)/node_modules $(ENGINES)/node_modules $(addprefix $(TYPESCRIPT)/,node_modules dist examples/dist) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find protos \( -name '*_pb2*' -o -name __init__.py -o -name py.typed \) -delete
	find alembic clients protos service tests tools -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(or $(PYTHON),false) -c '$(SUITABLE)' 2>/dev/null || { \
		echo 'make: $(or $(PYTHON),no Python found) is not suitable: Roster needs Python 3.11 or newer, with venv' \
			'and ensurepip (on Debian: apt install python3-venv). Select one: make PYTHON=/path/to/python3 …' >&2; \
		exit 1; }
	@echo 'Installing into $(VENV); this takes a minute the first time.'
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/installed: requirements.lock $(BUILD_INPUTS) | $(BIN)/python
	$(PIP_INSTALL) --require-hashes --requirement requirements.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable $(CLIENT) --editable .
	@touch $@

$(VENV)/development: $(VENV)/installed requirements-dev.lock
	$(PIP_INSTALL) --require-hashes --requirement requirements-dev.lock
	@touch $@

.tools/grpcurl-$(GRPCURL):
	@if command -v go >/dev/null; then \
		GOBIN='$(CURDIR)/.tools/bin' go install github.com/fullstorydev/grpcurl/cmd/grpcurl@$(GRPCURL) && touch $@; \
	else echo 'WARNING: no go on PATH: tests that use grpcurl are skipped' >&2; fi

# Compiled into Go's cache, from which buf.gen.yaml runs them.
.tools/generators-for-go: clients/go/tools/go.mod
	@if command -v go >/dev/null; then \
		go build -C clients/go/tools -o /dev/null tool && mkdir -p $(@D) && touch $@; \
	else echo 'WARNING: no go on PATH: the code of the clients is not compared with the contract' >&2; fi

.tools/pgbouncer/unpacked:
	@! tools/debian_programs.sh $(@D) pgbouncer || touch $@

.tools/failover/unpacked:
	@! tools/debian_programs.sh $(@D) haproxy etcd-server || touch $@

# With the system's Python, which the unprivileged user can run that PostgreSQL needs.
.tools/patroni/installed: $(PATRONI_LOCK)
	@/usr/bin/python3 -c '$(SUITABLE)' 2>/dev/null || { \
		echo 'WARNING: /usr/bin/python3 is missing, or has no venv: tests that use Patroni are skipped' >&2; exit 0; }; \
	/usr/bin/python3 -m venv --clear $(@D) && \
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --use-pep517 --require-hashes --requirement $< && touch $@

$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json
	@if command -v npm >/dev/null; then \
		npm ci --prefix $(NODE) --ignore-scripts --no-audit --no-fund --loglevel=error; \
	else echo 'WARNING: no npm on PATH: tests that use the Node client are skipped' >&2; fi

$(TYPESCRIPT)/node_modules/.package-lock.json: $(TYPESCRIPT)/package-lock.json
	@if command -v npm >/dev/null; then \
		npm ci --prefix $(TYPESCRIPT) --ignore-scripts --no-audit --no-fund --loglevel=error; \
	else echo 'WARNING: no npm on PATH: tests of the client for TypeScript are skipped' >&2; fi

$(TYPESCRIPT)/dist/index.js: $(TYPESCRIPT)/node_modules/.package-lock.json $(shell find $(TYPESCRIPT)/src $(TYPESCRIPT)/examples -name '*.ts')
	@if command -v npm >/dev/null; then npm run --prefix $(TYPESCRIPT) --silent build && touch $@; fi

# Its scripts only create the symlinks that tests/support/engines.py creates.
$(ENGINES)/node_modules/.package-lock.json: $(ENGINES)/package-lock.json
	@if command -v npm >/dev/null; then \
		npm ci --prefix $(ENGINES) --ignore-scripts --no-audit --no-fund --loglevel=error; \
	else echo 'WARNING: no npm on PATH: tests on other versions of PostgreSQL are skipped' >&2; fi

bench-peers: $(VENV)/development ## Build the servers that the benchmarks compare Roster with, and check their answers; needs Go and Node
	$(BIN)/python -m bench.peers.build
	$(BIN)/python -m bench.peers.check

bench: $(VENV)/development ## Run all benchmarks, which takes 25 minutes; needs `make bench-peers` once
	$(BIN)/python -m bench all $(OPTIONS)

bench-read: $(VENV)/development ## Benchmark reads; OPTIONS='--only get-64 --rounds 3' runs a part
	$(BIN)/python -m bench read $(OPTIONS)

bench-bulk: $(VENV)/development ## Benchmark bulk streams; OPTIONS='--only create --rounds 3' runs a part
	$(BIN)/python -m bench bulk $(OPTIONS)

bench-changes: $(VENV)/development ## Benchmark the change feed: what it costs writers, watchers, latency, catching up
	$(BIN)/python -m bench changes $(OPTIONS)

bench-commands: $(VENV)/development ## Benchmark `roster load` and `roster export`, the start, and memory
	$(BIN)/python -m bench commands $(OPTIONS)

bench-workers: $(VENV)/development ## Benchmark two workers against one
	$(BIN)/python -m bench workers $(OPTIONS)

bench-citus: $(VENV)/development ## Benchmark calls without Citus, on one node and on three of the cluster that ROSTER_TEST_CITUS_URL names; OPTIONS='--only List'
	$(BIN)/python -m bench.citus $(OPTIONS)
