# The project's commands. Each does the set-up it needs, from a clean clone on: a virtual environment in .venv from the
# lock file, and whatever else is missing in .cache. `make help` lists them.

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test check format bench bench-quick docs lock clean
MAKEFLAGS += --no-print-directory

# A Python that is new enough and can make virtual environments; 3.11 first, since vLLM's CPU build is tested on it.
# Another one: make PYTHON=/path/to/python3.12 …
PYTHON := $(shell for python in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$python -c 'import ensurepip, sys, venv; print(sys.executable) if sys.version_info >= (3, 11) else sys.exit(1)' \
	2>/dev/null && break; done)

BIN := .venv/bin
RUN := .venv/.run
ENV := .venv/.dev
LOCK := .ci/requirements.txt
IMAGE := --python-platform linux --python-version 3.11 --generate-hashes --upgrade --no-emit-index-url --no-header --quiet

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' Makefile | while IFS='|' read -r name what; do \
		printf '  %-18s %s\n' "$$name" "$$what"; done
	@echo "Arguments are passed on: make demo ARGS=--once, make test ARGS='tests/dispatch -x'"

setup: $(ENV) ## make the virtual environment

demo: $(RUN) ## compare agents' calls made directly and through the proxy, then serve on
	@$(BIN)/helium-proxy demo $(ARGS)

serve: $(RUN) ## serve the proxy: make serve ARGS='--worker http://gpu-1:8000'
	@$(BIN)/helium-proxy serve $(ARGS)

test: $(ENV) engines frameworks ## run every test, those on two real vLLM CPU engines and on agent frameworks too
	@$(BIN)/python -m pytest $(ARGS)

check: $(ENV) ## lint and check types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run docker/*.sh

format: $(ENV) ## format the code
	$(BIN)/ruff format

bench: $(ENV) ## measure against the peers, shortened to half an hour, and write docs/benchmarks.md anew
	$(BIN)/python -m benchmarks.build_peers
	$(BIN)/python -m benchmarks.report --run full $(ARGS)

bench-quick: $(ENV) ## a five-minute look at the same: docs/benchmarks-quick.md
	$(BIN)/python -m benchmarks.build_peers sglang-router
	$(BIN)/python -m benchmarks.report --run quick $(ARGS)

docs: $(ENV) ## write the tables of settings and metrics into docs from the code
	$(BIN)/python docs/build_configuration.py
	$(BIN)/python docs/build_metrics.py

lock: $(ENV) ## renew the lock files, of the checks and of the image, from pyproject.toml
	@printf 'hatchling>=1.25\neditables>=0.5\n' | $(BIN)/uv pip compile pyproject.toml - --extra dev --universal \
		--python-version 3.11 --upgrade --no-emit-index-url --no-annotate --no-header --quiet --output-file $(LOCK)
	@$(BIN)/uv pip compile pyproject.toml --extra redis --extra otel $(IMAGE) --output-file docker/requirements.txt
	@echo 'hatchling>=1.25' | $(BIN)/uv pip compile - $(IMAGE) --no-annotate --output-file docker/requirements-build.txt
	@wc -l $(LOCK) docker/requirements*.txt

clean: ## remove what was built (the environments in .cache, which take minutes, only with ALL=1)
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build $(if $(ALL),.cache)
	find . -name __pycache__ -prune -not -path './.cache/*' -exec rm -rf {} +

# -- set-up

PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile --no-build-isolation

$(RUN): pyproject.toml $(LOCK)
	@if [ -z "$(PYTHON)" ]; then echo "helium-proxy needs Python 3.11 or newer with its venv module, and none of" \
		"python3.11 … python3.14 is one. Debian: apt-get install python3-venv. Or: make PYTHON=/path/to/python" >&2; exit 1; fi
	@echo "setting up .venv with $(PYTHON), about a minute"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(PIP) --constraint $(LOCK) hatchling editables
	@$(PIP) --constraint $(LOCK) --editable '.[demo]'
	@touch $@

$(ENV): $(RUN)
	@echo "installing what development and tests need as well"
	@$(PIP) --no-deps --requirement $(LOCK)
	@touch $@

# The real engines' and the frameworks' environments. Where one cannot be built, its tests are skipped and say why.
.PHONY: engines frameworks
engines: $(ENV)
	@$(BIN)/python tests/vllm/build_env.py || echo "the tests on real vLLM engines will be skipped"

frameworks: $(ENV)
	@$(BIN)/python tests/frameworks/build_env.py || echo "the tests of those frameworks will be skipped"
