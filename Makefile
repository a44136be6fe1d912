# `make` lists the targets. Each one stands alone: it makes .venv when there is none and brings it up to date
# when pyproject.toml or constraints.txt changed. Another interpreter: make PYTHON=/path/to/python3.12 install

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install s3 demo test test-slow check proto bench bench-peers bench-compare docs notebooks dist test-dist test-compose test-network test-schedules chaos chaos-several chaos-goodput soak interop screenshots
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv with fedpeft, fedpeft-server and fedpeft-client
	@echo "installed: $(BIN)/fedpeft, $(BIN)/fedpeft-server, $(BIN)/fedpeft-client"

s3: .venv-s3/bin/moto_server ## set up an S3 for the tests in .venv-s3 (moto; its dependencies go with none of ours)

demo: $(STAMP) ## watch a federation of processes fine-tune a vision transformer on this machine (results in demo-out/)
	$(BIN)/fedpeft demo --out demo-out

test: $(STAMP) ## run the tests, all but the slow ones
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m "not slow"

test-slow: $(STAMP) ## run the slow tests of processes and the long fuzz (the others have targets of their own)
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m slow tests --ignore tests/docs --ignore tests/deploy --ignore tests/interop --ignore tests/console

check: $(STAMP) ## lint, format, types, imports, protocol, and that nothing generated is stale
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(WORKERS)
	MYPYPATH=deploy/grafana $(BIN)/mypy -p fedpeft_dashboards
	$(BIN)/lint-imports
	$(BIN)/buf lint protos
	$(BIN)/python protos/breaking.py
	$(BIN)/python protos/generate.py --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/python deploy/grafana/generate.py --check
	@echo "check: all is well"

proto: $(STAMP) ## generate common/fedpeft/v1 from protos/
	$(BIN)/buf lint protos
	$(BIN)/python protos/generate.py

bench: $(STAMP) ## measure rounds, memory and bytes beside a bare gRPC stream (results in benchmarks/results/)
	$(BIN)/python benchmarks/run.py --out benchmarks/results

bench-peers: $(STAMP) ## measure rounds beside Flower's, NVFlare's and a bare stream's, each in an environment of its own (build/peers)
	$(BIN)/python benchmarks/frameworks.py

bench-compare: $(STAMP) ## hold what `make bench` measured last against the figures that were kept, and say what got worse
	$(BIN)/python benchmarks/compare.py benchmarks/results/bench.json

docs: $(STAMP) ## build the documentation's site in build/site, a broken link being an error, and walk every tutorial and worked example
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/pytest -n $(WORKERS) tests/docs/test_tutorials.py tests/docs/test_coming_over.py

screenshots: $(STAMP) ## take the console's pictures again, over a federation that trains (docs/images, minutes)
	FEDPEFT_SCREENSHOTS=docs/images $(BIN)/pytest -q tests/console/test_screenshots.py

interop: $(STAMP) ## fetch the npm packages of the client in JavaScript, and hold runs with it (node, npm)
	cd tests/interop && npm install --loglevel error
	$(BIN)/pytest -n $(WORKERS) tests/interop

notebooks: $(STAMP) ## execute docs/notebooks with servers and clients of their own, and write what they show
	$(BIN)/python docs/notebooks/execute.py

dist: $(STAMP) ## build sdist and wheel in dist/ and check what PyPI would say of them; the version is git's newest tag
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	cd dist && sha256sum *.whl *.tar.gz > SHA256SUMS

test-network: $(STAMP) ## hold runs between two network namespaces: over TLS, through a proxy, on a line of 64 kbit/s (root, iproute2, tshark, tinyproxy)
	$(BIN)/pytest -n 0 -m slow tests/e2e/test_two_machines.py tests/e2e/test_proxy.py tests/e2e/test_slow_link.py

SCHEDULES ?= 1000
test-schedules: $(STAMP) ## hold SCHEDULES=1000 federations in simulated time, each with faults of its own, and a death before each effect on a disk
	SCHEDULES=$(SCHEDULES) STEP=1 $(BIN)/pytest -n $(WORKERS) tests/simulated_time

chaos: SCHEDULES = 300
chaos: $(STAMP) ## hold SCHEDULES=300 federations of real processes under faults: kills, power failures, full disks, bad lines (root; FIRST=SEED, STEP=1: a death before each effect)
	SCHEDULES=$(SCHEDULES) $(BIN)/pytest -n $(WORKERS) tests/chaos/test_chaos.py

chaos-several: SCHEDULES = 100
chaos-several: $(STAMP) ## hold SCHEDULES=100 of three daemons each, on one PostgreSQL and one S3 that fail as well, behind one address (FIRST=SEED)
	SCHEDULES=$(SCHEDULES) $(BIN)/pytest -n $(WORKERS) tests/chaos/test_several.py

MINUTES ?= 30
chaos-goodput: $(STAMP) ## count the rounds of MINUTES=30 with a process killed or stopped, or a line cut, every 29 s, and at the same time without
	cd tests && ../$(BIN)/python -m chaos.goodput --minutes $(MINUTES)

SOAK_MINUTES ?= 40
soak: $(STAMP) ## look at memory, open files and disk of processes that hold rounds for SOAK_MINUTES=40 under faults
	cd tests && ../$(BIN)/python -m chaos.soak --minutes $(SOAK_MINUTES)

test-dist: $(STAMP) ## install the wheel with [server] in a fresh environment without torch, and ask its commands
	$(BIN)/pytest -n 0 -m slow tests/docs/test_installed.py

test-compose: $(STAMP) ## run deploy/docker-compose.yml with podman to the end of a federation (root, 20 GB); restore a backup
	$(BIN)/pytest -n 0 -m slow tests/deploy/test_compose_federation.py tests/deploy/test_compose_several.py tests/e2e/test_backup.py

.venv-s3/bin/moto_server: Makefile
	$(PYTHON) -m venv .venv-s3
	.venv-s3/bin/python -m pip install --quiet "moto==5.2.5" "flask==3.1.3" "flask-cors==6.0.5"
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; FedPEFT needs Python 3.11 or newer."; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "$(PYTHON) is Python %d.%d; FedPEFT needs 3.11 or newer: make PYTHON=/path/to/python3.11" % v[:2])'
	@echo "setting up $(VENV) (the first time about 5 GB are fetched: PyTorch comes with its GPU libraries)"
	@$(PYTHON) -c 'import ensurepip' || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	@touch $@
