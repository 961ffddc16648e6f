# Everything a fresh clone needs: `make demo` shows it, `make test` proves it.
# Wants Python 3.11 or later, make and a package index; no GPU, no model hub.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PACK   := $(BIN)/gemma-pack
TOOLS  := docker-registry skopeo buildah podman chromium
# With REGISTRY=host:port/name, `make demo` also pushes there and pulls back.
REGISTRY ?=

.DEFAULT_GOAL := help
.PHONY: help demo install dev test check format bench speed tools clean

help:
	@echo "make demo    quantize, validate and package a real Gemma 3 270M (REGISTRY=host:port/name pushes it too)"
	@echo "make test    everything that proves it: check, then the tests, a real server included"
	@echo "make check   lint, format, types, import rules"
	@echo "make bench   measure every recipe beside other tools on the same windows (Debian; an hour)"
	@echo "make speed   time quantizing beside llm-compressor and beside plain copying (half an hour on two cores)"
	@echo "make clean   remove the environments and what demo made"

demo: install
	$(PACK) build examples/demo.yaml $(if $(REGISTRY),--push $(REGISTRY))

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

# A machine without an NVIDIA driver gets torch's CPU build where pip can find it (a find-links directory or an extra
# index that the user has configured), because the default build brings several GB of CUDA libraries.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || \
	  if command -v nvidia-smi >/dev/null; then $(BIN)/pip install -q -c constraints.txt torch; \
	  else $(BIN)/pip install -q -c constraints.txt torch==2.13.0+cpu || $(BIN)/pip install -q -c constraints.txt torch; fi
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(BIN)/pip install -q -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,ray,tasks,dev]'
	touch $@

# vLLM's CPU build pins another compressed-tensors than llm-compressor does: it lives in an environment of its own.
.venv-vllm/.installed: tests/real/vllm-requirements.txt tests/real/install_vllm.py
	$(PYTHON) tests/real/install_vllm.py .venv-vllm
	touch $@

# Debian's packages, where we may install them. Elsewhere the tests say which tool is missing and skip.
tools:
	@missing=""; for tool in $(TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -z "$$missing" ]; then exit 0; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else echo "missing tools, their tests will be skipped:$$missing"; fi

check: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Fast tests first; then those with the real model, one process, because each fills both cores by itself.
test: tools dev .venv-vllm/.installed check
	$(BIN)/python -m pytest -m "not real and not gpu" -n 2 -q
	$(BIN)/python -m pytest -m "real and not gpu" -q

format: dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: dev
	$(BIN)/python bench/quality.py build/bench

speed: dev
	for part in calibrated together refinement streamed; do $(BIN)/python bench/speed.py $$part build/speed || exit 1; done

clean:
	rm -rf $(VENV) .venv-vllm demo
