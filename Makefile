# make demo   the whole job on a laptop: train a tiny model on real handwriting, merge it, ask it
# make test   the tests
# Both make their own .venv first, and nothing is done twice.

PYTHON ?= python3
# Where torch comes from; empty is pip's own choice. See INSTALL.md for a build without CUDA.
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
VLTRAIN := $(BIN)/vltrain
INSTALLED := $(VENV)/.installed

.PHONY: install demo test test-fast test-matrix lint clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is missing or older than Python 3.11"; \
	  echo "  fix: name another one, as in make install PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/pip install -c constraints.txt torch --index-url $(TORCH_INDEX))
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

# --- the demo: every step is the file that it leaves behind ---

# One of the pictures that were not trained on.
ASKED := demo/images/heldout-00237.png

demo: demo/merged_answers.jsonl demo/base_answers.jsonl
	$(VLTRAIN) demo demo --score
	rm -f demo/answer.png
	printf '%s\n' '/image $(ASKED)' 'Read the digits from left to right.' \
	  'Where are the digits?' '/box demo/answer.png' /quit | $(VLTRAIN) chat demo/merged

demo/train.json: | $(INSTALLED)
	$(VLTRAIN) demo demo

demo/run/final/adapter_config.json: demo/train.json
	$(VLTRAIN) check demo/train.json --model demo/model
	$(VLTRAIN) lora recipes/demo_lora.yaml
	touch -c $@

demo/merged/config.json: demo/run/final/adapter_config.json
	$(VLTRAIN) merge demo/run/final demo/merged

demo/base_answers.jsonl: demo/train.json
	$(VLTRAIN) chat demo/model --input demo/heldout.json --output $@ --max-new-tokens 96

demo/merged_answers.jsonl: demo/merged/config.json
	$(VLTRAIN) chat demo/merged --input demo/heldout.json --output $@ --max-new-tokens 96

# --- development ---

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not gpu and not matrix"

test-matrix: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "matrix and not gpu"

test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The demo and what tests and builds leave behind; .venv stays.
clean:
	rm -rf demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
