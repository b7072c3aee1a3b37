# make demo      run the demonstration model on a picture
# make test      the tests; `make test-all` adds the slow ones (real builds and installations)
# make lint      ruff format --check, ruff check, mypy
# make goldens   rebuild the reference numbers with torch and transformers, and compare
# make bench-peers  speed and memory beside mlx-lm and mlx-vlm, on random weights
# make bench-cold   from the start of the process to the first token, beside mlx-lm
# make bench-convert  conversions: time and memory beside the peers, 397B's widths, same logits, demo
# make bench-kernels  bytes, lines and barriers of every Metal kernel, executed on the CPU; the
#                     recurrence beside that of mlx-lm and MLX
# make bench-launches  launches per decoded token beside mlx-lm and mlx-vlm
# make bench-demo   how often the demonstration model is right
# Everything is installed into .venv (goldens, bench: .venv-goldens, .venv-bench), once, and again
# when pyproject.toml changes. Another Python: make PYTHON=/path/to/python3.12 demo

SHELL := /bin/bash
VENV := .venv
GOLDENS := .venv-goldens
BENCH := .venv-bench
TEST_JOBS ?= 2
REFERENCES := torch==2.13.0 transformers==5.23.0
PEERS := mlx-lm==0.32.2 mlx-vlm==0.7.10
PIP_FLAGS := --quiet --disable-pip-version-check

# The first of these that runs and is new enough: macOS's own python3 is 3.9.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	"$$p" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: help demo test test-all lint goldens bench-peers bench-cold bench-demo bench-convert bench-kernels \
	bench-launches clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# //p' Makefile | head -13

demo: $(VENV)/.installed
	$(VENV)/bin/python -m qwen35_mlx.generate --model examples/demo-model \
		--image examples/pictures/shapes.png --prompt "Describe this picture."

test: ARGS := -n $(TEST_JOBS)
test-all: ARGS := -n $(TEST_JOBS) -m ""
test test-all:
	@t0=$$(date +%s) && $(MAKE) --no-print-directory $(VENV)/.installed-test && t1=$$(date +%s) && \
	rc=0 && { $(VENV)/bin/python -m pytest $(ARGS) || rc=$$?; } && t2=$$(date +%s) && \
	echo "installation took $$((t1 - t0)) s, tests took $$((t2 - t1)) s" && exit $$rc

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

goldens: $(GOLDENS)/.installed
	@rc=0; for script in tests/goldens/make_*.py; do \
		echo "$$script"; PYTHONPATH=tests $(GOLDENS)/bin/python "$$script" --check || rc=1; done; \
	if [ $$rc = 0 ]; then echo "goldens: none moved"; else echo "goldens: some moved (see above)"; fi; \
	exit $$rc

bench-peers: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/peers.py $(ARGS)

bench-cold: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/cold_start.py $(ARGS)

bench-convert: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/conversion.py $(ARGS)
	$(BENCH)/bin/python benchmarks/conversion_memory.py
	$(BENCH)/bin/python benchmarks/same_logits.py
	$(BENCH)/bin/python benchmarks/converted_accuracy.py

bench-kernels: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/kernel_traffic.py
	$(BENCH)/bin/python benchmarks/delta_traffic.py --tokens 1
	$(BENCH)/bin/python benchmarks/delta_traffic.py --tokens 128

bench-launches: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/launches_beside_peers.py $(ARGS)

bench-demo: $(VENV)/.installed
	$(VENV)/bin/python benchmarks/demo_accuracy.py $(ARGS)

clean:
	rm -rf $(VENV) $(GOLDENS) $(BENCH) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# -- environments ------------------------------------------------------------------------------
# The stamps lie inside the environment, so removing it removes them; a broken interpreter link
# counts as absent and the environment is made anew.

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "installing qwen35_mlx into $(VENV) (the first time downloads about 150 MB)"
	@$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	@echo "installing qwen35_mlx and what its tests need into $(VENV)"
	@$(VENV)/bin/python -m pip install $(PIP_FLAGS) -e '.[test]'
	@touch $(VENV)/.installed $@

$(GOLDENS)/.installed: pyproject.toml Makefile | $(GOLDENS)/bin/python
	@echo "installing $(REFERENCES) into $(GOLDENS)"
	@$(GOLDENS)/bin/python -m pip install $(PIP_FLAGS) $(REFERENCES) -e .
	@touch $@

$(BENCH)/.installed: pyproject.toml Makefile | $(BENCH)/bin/python
	@echo "installing $(PEERS) into $(BENCH)"
	@$(BENCH)/bin/python -m pip install $(PIP_FLAGS) $(PEERS) -e '.[test]'
	@touch $@

$(VENV)/bin/python $(GOLDENS)/bin/python $(BENCH)/bin/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.11 or newer found (python3 is $$(python3 --version 2>&1 || true))." >&2; \
		echo "Install one (macOS: brew install python; Debian: apt install python3 python3-venv)" >&2; \
		echo "or name yours: make PYTHON=/path/to/python3.12 demo" >&2; exit 1; fi
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || { \
		echo "make: PYTHON=$(PYTHON) is $$("$(PYTHON)" --version 2>&1); 3.11 or newer is needed." >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
		echo "make: $(PYTHON) lacks venv or pip (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@"$(PYTHON)" -m venv --clear $(@D:/bin=)
