# The commands that a developer types. They run in a virtual environment of their own, .venv. With VENV= (empty) they run
# in the environment of PYTHON, which must have torch, pytest and the rest already: nothing is installed there.
#   make test
#   make test VENV= PYTHON=python3

PYTHON ?= python3
VENV ?= .venv
OUT ?= gpu_out
TORCH ?= torch==2.13.0

# A machine with a GPU already has its torch: no environment is made there, and nothing is installed.
ifneq ($(filter gpu,$(MAKECMDGOALS)),)
VENV :=
endif

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif

.PHONY: help demo article recipe edge study check test thorough toolkits arm wheel matrix fuzz soak sanitize bench gpu build format lint clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## */  make \1	/p' Makefile

demo: build  ## train a small recogniser on real speech: no clipping, the Python loop, fastclip
	$(PY) -m examples.speech $(ARGS)

article: build  ## a DNN, a CNN and an RNN on real speech, loop and fastclip: accuracy, time, memory; ARGS="--resume" goes on
	$(PY) -m examples.article $(ARGS)

recipe: .requirements build  ## ESPnet's own program trains a Conformer on real speech, plain and under fastclip.run; under 10 minutes
	$(PY) -m examples.recipe $(ARGS)

edge: .requirements build  ## a Conformer adapted to a new voice, last layers, LoRA, all: error rates, peak memory; under 10 minutes
	$(PY) -m examples.edge $(ARGS)

study: build  ## what clipping does to training: 588 small trainings, about an hour; goes on where it was stopped
	$(PY) -m studies.clipping $(ARGS)

# With pytest-xdist, in several processes: their OpenMP threads must not spin while another process works. In the order
# of the files: by itself it takes those of few tests last, and the longest of all is one.
IN_PARALLEL = $(shell $(PY) -c "import xdist" 2>/dev/null && echo " -n auto --maxprocesses 4 --dist loadfile" && \
	$(PY) -m pytest --help 2>/dev/null | grep -o -- "--no-loadscope-reorder" | head -1)

check: export OMP_WAIT_POLICY ?= passive
check: .requirements build  ## the tests of the step, without slow ones: under 90 seconds on two cores
	$(PY) -m pytest $(IN_PARALLEL) -m "not slow and not thorough" tests/step tests/drop_in/test_drop_in.py $(ARGS)

test: export OMP_WAIT_POLICY ?= passive
test: .requirements build  ## the tests; under 15 minutes on two cores
	$(PY) -m pytest $(IN_PARALLEL) $(ARGS)

thorough: export OMP_WAIT_POLICY ?= passive
thorough: .requirements build  ## what `make test` leaves out: planted bugs, a compilation for each; about 8 minutes
	$(PY) -m pytest $(IN_PARALLEL) -m thorough $(ARGS)

toolkits: .requirements .requirements-nemo build  ## real toolkits with fastclip, NeMo in an environment of its own; 5 minutes the first time
	$(PY) -m pytest $(IN_PARALLEL) -m "" tests/toolkits $(ARGS)
	$(PY_WITH_NEMO) -m pytest -m "" tests/toolkits -k "nemo or NeMo" $(ARGS)

arm: .requirements $(if $(findstring --wheel,$(ARGS)),.requirements-wheel) build  ## on aarch64, in emulation: the bits of this machine, the tests of the step; under 8 minutes, or why not
	$(PY) -m tests.arm $(ARGS) || [ $$? -eq 77 ]

wheel: .requirements-wheel  ## an sdist and a wheel for this Python that PyPI takes, in dist/; 4 minutes, 10 with CUDA
	$(WHEEL_PY) distribution/make_wheel.py $(ARGS)

matrix: .requirements build  ## builds and tests with each torch and Python that is supported; about 20 minutes, 3 GB to download
	$(PY) -m tests.matrix $(ARGS)

fuzz: .requirements build  ## 10,000 random optimizers and steps against the plain loop, about 5 minutes; ARGS="--seed N" repeats a run, --limits draws limits
	$(PY) -m tests.long.fuzz $(ARGS)

soak: .requirements build  ## a million steps: flat memory, torch's bits at the end; about 8 minutes; ARGS="--steps N" takes less
	$(PY) -m tests.long.soak $(ARGS)

sanitize: .requirements  ## the C++ under address, undefined and thread sanitizers, 8 to 15 minutes; ARGS="--only thread"
	$(PY) -m tests.sanitize $(ARGS)

bench: build  ## time fastclip against the Python loop and the best of torch, about 8 minutes; leave the machine alone
	$(PY) -m benchmarks cpu $(ARGS)

gpu:  ## on a machine with a GPU, in PYTHON's environment: build, tests, sanitizer, benchmark, ncu; under 8 minutes; OUT=
	@$(PY) -m benchmarks gpu-session --out "$(OUT)" $(ARGS)

build: .requirements-demo  ## the extension, in place
	@echo "Building fastclip: 1 to 3 minutes the first time, longer with CUDA on an old machine. Log: build.log"
	@$(PY) setup.py build_ext --inplace > build.log 2>&1 || { cat build.log; exit 1; }
	@$(PY) -m fastclip

CXX_FILES = $(shell find csrc distribution fastclip tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

format: .requirements  ## writes all code in the project's format: ruff, clang-format; nothing is built
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	clang-format -i $(CXX_FILES)

lint: .requirements  ## the same, and changes nothing: fails where `make format` would change something
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	clang-format --dry-run --Werror $(CXX_FILES)

clean:  ## what was built
	rm -rf build build.log fastclip/*.so fastclip/_build_info.py

# Two steps, so that a demo does not wait for what only the tests need.
ifeq ($(strip $(VENV)),)
PY_WITH_NEMO := $(PYTHON)
WHEEL_PY := $(PYTHON)
.requirements .requirements-demo .requirements-nemo .requirements-wheel:
else
PY_WITH_NEMO := $(VENV)-nemo/bin/python
WHEEL_PY := $(VENV)-wheel/bin/python
ENVIRONMENT := $(VENV)/installed-$(subst =,-,$(TORCH))
.requirements: $(ENVIRONMENT)-all
.requirements-demo: $(ENVIRONMENT)
NEMO_ENVIRONMENT := $(VENV)-nemo/installed-$(subst =,-,$(TORCH))
.requirements-nemo: $(NEMO_ENVIRONMENT)
WHEEL_ENVIRONMENT := $(VENV)-wheel/installed
.requirements-wheel: $(WHEEL_ENVIRONMENT)
# torch is pinned: a range would bring gigabytes of CUDA libraries that fastclip does not need.
$(ENVIRONMENT): requirements-demo.txt
	@echo "Making $(VENV): torch and a few packages, about a minute (300 MB)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)" -r requirements-demo.txt
	touch $@
$(ENVIRONMENT)-all: $(ENVIRONMENT) requirements.txt requirements-trainers.txt requirements-toolkits.txt
	@echo "Adding what the tests need to $(VENV), about two minutes (300 MB)"
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)" -r requirements.txt -r requirements-trainers.txt
	-$(VENV)/bin/python -m pip install --quiet --no-deps -r requirements-toolkits.txt  # its tests say if it is missing
	-$(VENV)/bin/python -m tests.support.torchaudio_on_cpu  # where that fails, the tests that need torchaudio say so
	touch $@
$(NEMO_ENVIRONMENT): requirements-nemo.txt
	@echo "Making $(VENV)-nemo: torch and NeMo, about two minutes (2.2 GB)"
	$(PYTHON) -m venv $(VENV)-nemo
	$(VENV)-nemo/bin/python -m pip install --quiet "$(TORCH)" -r requirements-nemo.txt
	$(VENV)-nemo/bin/python -m tests.support.torchaudio_on_cpu
	touch $@
$(WHEEL_ENVIRONMENT): requirements-wheel.txt
	@echo "Making $(VENV)-wheel: the tools to make a wheel, a few seconds (20 MB)"
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet -r requirements-wheel.txt
	touch $@
endif
.PHONY: .requirements .requirements-demo .requirements-nemo .requirements-wheel
