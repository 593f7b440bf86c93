# Everything a checkout needs is made here: .venv, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
LIBRARIES := .venv/.model-libraries

.PHONY: demo test all-tests check format lint types clean

demo: $(INSTALLED)  ## run the usage example
	$(BIN)/python examples/usage_example.py

test: $(INSTALLED) $(LIBRARIES)  ## run the tests but the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

all-tests: $(INSTALLED) $(LIBRARIES)  ## run all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: format lint types all-tests  ## what a change must pass

format: $(INSTALLED)
	$(BIN)/ruff format --check .

lint: $(INSTALLED)
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

$(INSTALLED): pyproject.toml constraints.txt $(wildcard bsa_vision/attention/backends/*.cpp bsa_vision/attention/backends/*.h)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# For tests only, see tests/neighbours.py. What these depend on is in the environment already.
$(LIBRARIES): $(INSTALLED) Makefile
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --no-build-isolation --upgrade \
		--target .venv/model-libraries timm segment-anything torchvision \
		sam2 hydra-core iopath omegaconf antlr4-python3-runtime portalocker tqdm \
		peft accelerate psutil
	touch $@

clean:
	rm -rf .venv build out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
