# `make` alone lists the commands.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help install run migrate lint format check test tools lock reference contract clean bench \
	bench-peers bench-read bench-bulk bench-commands bench-workers test-crash test-upgrade test-hostile test-timing test-go audit sbom

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
BUILD_INPUTS := pyproject.toml hatch_build.py $(wildcard protos/*/*/*.proto)
# Not the programs that somebody tries in the checkout, such as the README's hello.py.
SOURCES := alembic bench deploy examples hatch_build.py service tests tools
NODE := tests/e2e/node
# What `make check` runs besides lint: the unit tests, and at least one file of each layer above them.
CHECKED := tests/unit $(addprefix tests/integration/test_,user_repository.py post_repository.py repository.py \
	idempotency.py bulk_repository.py) \
	$(addprefix tests/e2e/test_,users.py posts.py lists.py bulk_create.py bulk_update.py bad_input.py)
GRPCURL := v1.9.4
LOCK := uv pip compile pyproject.toml --quiet $(if $(UPGRADE),--upgrade) --universal \
	--generate-hashes --no-header --no-emit-index-url --no-emit-find-links

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

format: $(VENV)/development ## Format the code and fix what ruff can fix
	$(BIN)/ruff check --fix-only $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

check: lint ## Check format, style, types, the unit tests and a part of the others on SQLite, in a minute
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -k 'not postgresql' $(CHECKED)

test: lint tools ## Run all tests, on SQLite and on a PostgreSQL server of their own; takes ten minutes
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-crash: $(VENV)/development ## Test loads through crashes for 10 minutes; SECONDS=3600 for an hour
	SECONDS=$(or $(SECONDS),600) $(BIN)/python -m tests.faults.soak

test-upgrade: $(VENV)/development ## Upgrade from the previous release under traffic, by stopping servers and by killing them; ROUNDS=10
	ROSTER_TEST_UPGRADES=$(or $(ROUNDS),3) $(BIN)/python -m pytest tests/e2e/test_two_releases.py tests/integration/test_migration_faults.py

test-hostile: $(VENV)/development ## Attack a server for half an hour; SCALE=3 for attacks three times as large as in `make test`
	ROSTER_TEST_SCALE=$(or $(SCALE),10) $(BIN)/python -m pytest tests/e2e/hostile --timeout 1800

test-timing: $(VENV)/development ## Check that response times of VerifyPassword do not reveal which users exist; takes minutes
	$(BIN)/python -m pytest --capture=no tests/e2e/timing_of_passwords.py

audit: $(VENV)/development ## Check the pinned dependencies for known vulnerabilities; needs the network
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

sbom: $(VENV)/development ## Write the pinned dependencies with their hashes to dist/roster.cdx.json (CycloneDX)
	@mkdir -p dist
	$(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file dist/roster.cdx.json requirements.lock

test-go: $(VENV)/development ## Run the Go example of docs/calling.md; needs Go, and a minute the first time
	ROSTER_TEST_GO=1 $(BIN)/python -m pytest tests/e2e/test_calling.py --timeout 600

tools: .tools/grpcurl-$(GRPCURL) $(NODE)/node_modules/.package-lock.json ## Install grpcurl and the Node client, which some tests use

lock: ## Resolve and pin the dependencies; UPGRADE=1 takes the newest versions; needs uv
	@command -v uv >/dev/null || { echo 'make: uv is not on PATH: pip install uv' >&2; exit 1; }
	$(LOCK) --group build --output-file requirements.lock
	$(LOCK) --group build --extra tracing --constraint requirements.lock --output-file deploy/requirements.lock
	$(LOCK) --group dev --all-extras --constraint requirements.lock --output-file requirements-dev.lock

reference: $(VENV)/development ## Generate docs/reference.md from the protos
	$(BIN)/python -m tools.contract_reference docs/reference.md

contract: $(VENV)/development ## Record the protos as released; later versions are compared with them
	$(BIN)/python -m tools.contract_image protos/released.binpb

clean: ## Remove installed, generated and cached files; data is kept
	rm -rf $(VENV) .bench .tools dist $(NODE)/node_modules .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find protos \( -name '*_pb2*' -o -name __init__.py -o -name py.typed \) -delete
	find alembic hatch_build.py protos service tests tools -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(or $(PYTHON),false) -c '$(SUITABLE)' 2>/dev/null || { \
		echo 'make: $(or $(PYTHON),no Python found) is not suitable: Roster needs Python 3.11 or newer, with venv' \
			'and ensurepip (on Debian: apt install python3-venv). Select one: make PYTHON=/path/to/python3 …' >&2; \
		exit 1; }
	@echo 'Installing into $(VENV); this takes a minute the first time.'
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/installed: requirements.lock $(BUILD_INPUTS) | $(BIN)/python
	$(PIP_INSTALL) --require-hashes --requirement requirements.lock
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/development: $(VENV)/installed requirements-dev.lock
	$(PIP_INSTALL) --require-hashes --requirement requirements-dev.lock
	@touch $@

.tools/grpcurl-$(GRPCURL):
	@if command -v go >/dev/null; then \
		GOBIN='$(CURDIR)/.tools/bin' go install github.com/fullstorydev/grpcurl/cmd/grpcurl@$(GRPCURL) && touch $@; \
	else echo 'WARNING: no go on PATH: tests that use grpcurl are skipped' >&2; fi

$(NODE)/node_modules/.package-lock.json: $(NODE)/package-lock.json
	@if command -v npm >/dev/null; then \
		npm ci --prefix $(NODE) --ignore-scripts --no-audit --no-fund --loglevel=error; \
	else echo 'WARNING: no npm on PATH: tests that use the Node client are skipped' >&2; fi

bench-peers: $(VENV)/development ## Build the servers that the benchmarks compare Roster with, and check their answers; needs Go and Node
	$(BIN)/python -m bench.peers.build
	$(BIN)/python -m bench.peers.check

bench: $(VENV)/development ## Run all benchmarks, which takes 25 minutes; needs `make bench-peers` once
	$(BIN)/python -m bench all $(OPTIONS)

bench-read: $(VENV)/development ## Benchmark reads; OPTIONS='--only get-64 --rounds 3' runs a part
	$(BIN)/python -m bench read $(OPTIONS)

bench-bulk: $(VENV)/development ## Benchmark bulk streams; OPTIONS='--only create --rounds 3' runs a part
	$(BIN)/python -m bench bulk $(OPTIONS)

bench-commands: $(VENV)/development ## Benchmark `roster load` and `roster export`, the start, and memory
	$(BIN)/python -m bench commands $(OPTIONS)

bench-workers: $(VENV)/development ## Benchmark two workers against one
	$(BIN)/python -m bench workers $(OPTIONS)
