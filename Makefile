# Two verbs set everything up: `make demo` and `make test`. Installs go through constraints.txt, the tested set.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --config_file configs/accelerate/single.yaml
RUN := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: demo test test-all test-gpu-torch check install clean

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

# torch.compile is another one in each torch: what 2.13 takes, 2.11 may leave out. 3 GB of packages, no GPU needed.
GPU_TORCH := 2.11.0
test-gpu-torch:  ## the models and their compiled layers on the torch that the GPUs are tested with
	$(PYTHON) -m venv $(VENV)-torch-$(GPU_TORCH)
	grep -vE '^(torch|triton)==' constraints.txt > $(VENV)-torch-$(GPU_TORCH)/constraints.txt
	$(VENV)-torch-$(GPU_TORCH)/bin/pip install --quiet --constraint $(VENV)-torch-$(GPU_TORCH)/constraints.txt \
		torch==$(GPU_TORCH) --editable '.[dev]'
	OMP_NUM_THREADS=1 $(VENV)-torch-$(GPU_TORCH)/bin/python -m pytest -n 2 -q -p no:cacheprovider \
		tests/test_lora.py tests/test_compile.py tests/test_model.py tests/test_logprobs.py tests/test_attention.py \
		tests/test_fsdp.py

check: install  ## before every commit: lint, format, types, tests that launch nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(RUN) -n 2 --dist worksteal -m "not slow and not launch and not ranks" -q

clean:
	rm -rf $(VENV) $(VENV)-torch-* runs build *.egg-info
