# Two verbs set everything up: `make demo` and `make test`. Installs go through constraints.txt, the tested set.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --config_file configs/accelerate/single.yaml
RUN := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-all check install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# One thread: two are a quarter faster on two idle cores, but twice as slow when something else wants one of them.
demo: export OMP_NUM_THREADS ?= 1
demo: install  ## train the embedded tiny model from random weights to right answers, then to preferred ones
	rm -rf runs/tiny-sft runs/tiny-dpo
	$(LAUNCH) launch/sft.py
	@echo
	$(LAUNCH) launch/dpo.py
	@echo
	@echo "Look at the curves and samples:  $(BIN)/tensorboard --logdir runs --samples_per_plugin text=100"

test: install  ## every CPU test, as CI runs them
	$(RUN) -n 2 --dist worksteal -m "not slow"

test-all: install  ## the long fault and fuzz runs too
	$(RUN) -n 2 --dist worksteal

check: install  ## before every commit: lint, format, types, tests that launch nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(RUN) -n 2 --dist worksteal -m "not slow and not launch and not ranks" -q

clean:
	rm -rf $(VENV) runs build *.egg-info
