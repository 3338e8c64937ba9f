# Two commands do everything on a fresh machine, set-up included:  make demo   make test
#
#   PYTHON=python3.12         the interpreter to make .venv with
#   PYTHON=python3 VENV=none  use an interpreter that already has torch and the test tools (an offline GPU machine)
#   GPU_CHECK="--out FOLDER"   what gpu-check is given: --budget SECONDS, --out FOLDER, --only PART ...
#   DLB_FAST_BUILD=...        auto (default), require, cpu, cuda, none: see setup.py

export PYTHON ?= python3
export VENV ?= .venv
export TORCH ?= torch==2.13.0
export JOBS ?= 2

ifeq ($(VENV),none)
PY := $(PYTHON)
READY := .built
TRAIN := .built
else
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
TRAIN := $(VENV)/.train
endif

SOURCES := setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: setup demo test test-slow other-torch lint gpu-check bench doctor wheel sdist docs clean
setup: $(READY)

$(READY): $(SOURCES)
	.ci/run setup
	touch $@ $(TRAIN)

export PYTHONPATH := $(CURDIR):$(PYTHONPATH)

ifneq ($(TRAIN),$(READY))
$(TRAIN): $(SOURCES)
	.ci/run setup-train
	touch $@
endif

# Needs the trainer and no linters or test tools.
demo: $(TRAIN)
	$(PY) -m dlb_fast demo

test test-slow other-torch: $(READY)
	.ci/run $@

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m mypy

# On a machine with a GPU: builds (in its own time where there is no venv to make), proves and measures.
gpu-check: export DLB_FAST_BUILD := cuda
gpu-check: $(filter-out .built,$(READY))
	$(PY) -m benchmarks.gpu_check $(GPU_CHECK)

bench: $(READY)
	$(PY) -m benchmarks.bench_last_batch

doctor: $(READY)
	$(PY) -m dlb_fast doctor --self-test

# One file for every Python >= 3.10 and torch >= 2.10 on this platform. The earlier build/lib would be packed along.
wheel: $(READY)
	rm -rf build/lib* build/bdist*
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w dist .

sdist: $(READY)
	$(PY) -c "from setuptools.build_meta import build_sdist; print('dist/' + build_sdist('dist'))"

# The site lands in site/; anything doubtful (a dead link, a page outside the navigation) is an error.
docs: $(READY)
	$(PY) -c "import mkdocstrings" 2>/dev/null || $(PY) -m pip install -q --no-build-isolation -e ".[docs]"
	$(PY) -m mkdocs build --strict

clean:
	rm -rf build dist site .built *.egg-info dlb_fast/lib dlb_fast/_build*.so
