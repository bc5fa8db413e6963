# make install   .venv with everything, and the extension built (a second call takes about a second)
# make demo      train a small GPT on the simulated device
# make test      run the test suite
# make check     lint, formatting, types
# make bench     run the benchmarks (one that finds nothing to compare with, status 2, is no failure)
# make clean     remove what was built, and .venv
#
# Needs python3 (3.11 or later) with venv, g++ and make. torch comes from the index that pip is set
# up with; to get the small CPU wheel where that serves CUDA's, set PIP_INDEX_URL or
# PIP_EXTRA_INDEX_URL to PyTorch's CPU index. MAX_JOBS limits the compiler processes.

PYTHON ?= python3
TORCH := torch==2.13.0

BIN := .venv/bin
STAMPS := .venv/.stamps
SOURCES := setup.py $(shell find csrc_stubs -type f)
PYTHON_FILES := torch_trn tests examples benchmarks setup.py
NATIVE_FILES := $(filter %.h %.cpp,$(SOURCES))

# ninja and the compilers' helpers of the environment come before those of the machine.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test check bench clean

install: $(STAMPS)/extension

demo: install
	$(BIN)/python examples/train_gpt.py

test: install
	@$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check $(wildcard $(PYTHON_FILES))
	$(BIN)/ruff format --check $(wildcard $(PYTHON_FILES))
	$(BIN)/clang-format --dry-run --Werror $(NATIVE_FILES)
	$(BIN)/mypy

bench: install
	@set -e; for file in $(sort $(wildcard benchmarks/*.py)); do \
		echo "== $$file"; $(BIN)/python $$file || test $$? -eq 2; done

clean:
	rm -rf .venv build *.egg-info torch_trn/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; set PYTHON=<a newer one>"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@mkdir -p $(STAMPS)
	@touch $@

# torch first: setup.py builds against it, and nothing after it may bring another version.
$(STAMPS)/torch: $(STAMPS)/venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	@touch $@

# The packages that pyproject.toml names; the extension is built by the next rule.
$(STAMPS)/packages: pyproject.toml $(STAMPS)/torch
	$(BIN)/python -m pip install --quiet $(TORCH) \
		$$($(BIN)/python -c 'import tomllib; \
		project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		names = project["dependencies"] + project["optional-dependencies"]["dev"]; \
		print(*names)')
	@touch $@

# An editable install compiles in a temporary directory unless told otherwise: told once by the
# command's name and, because setuptools asks a second time, by that of torch's class for it. In the
# directory that `setup.py build_ext --inplace` uses, a second build compiles only what changed.
$(STAMPS)/extension: $(SOURCES) $(STAMPS)/packages
	@mkdir -p build
	@$(BIN)/python -c 'import sys, sysconfig; \
		tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"; \
		names = "build_ext", "BuildExtension", "cls_with_options"; \
		print(*(f"[{name}]\nbuild_temp = build/temp.{tag}" for name in names), sep="\n")' \
		> build/extension.cfg
	DIST_EXTRA_CONFIG=build/extension.cfg TORCH_DEVICE_BACKEND_AUTOLOAD=0 $(BIN)/python -m pip \
		install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
