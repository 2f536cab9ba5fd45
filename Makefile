# make quickstart | test | lint; ACCEL=gpu or ACCEL=tpu installs JAX for that accelerator.
PYTHON ?= python3
VENV ?= .venv
ACCEL ?=
WORKDIR ?= quickstart
comma := ,
EXTRA = $(if $(ACCEL),$(comma)$(ACCEL))
BIN = $(VENV)/bin

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.quickstart$(ACCEL)
	$(BIN)/clara quickstart --workdir $(WORKDIR) $(ARGS)

test: $(VENV)/.test$(ACCEL)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

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
