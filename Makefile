# The course's commands. `make` alone lists them.
#
#   PYTHON=python3.12   which Python builds the environment (3.11 or newer)
#   TORCH=cpu           take PyTorch's smaller build without GPU support (`make clean-env` first
#                       when the environment already exists)

PYTHON ?= python3
TORCH ?= default
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
READY_TESTS := $(VENV)/.ready-tests
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n logical --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help lab test test-fast lectures assignments grade claims kernels bench capstone capstone-quick \
	lint format lock clean clean-env

help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(READY): requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is %d.%d: run make PYTHON=/path/to/python3.12" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "This Python cannot make environments: on Debian and Ubuntu, sudo apt install python3-venv"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Setting up (2 to 10 minutes, mostly PyTorch's download) ..."
ifeq ($(TORCH),cpu)
	$(PIP) uv
	$(VENV)/bin/uv pip install --quiet --python $(PY) --torch-backend cpu "$$(grep '^torch==' requirements.txt)"
endif
	$(PIP) -r requirements.txt -c requirements.lock
	@touch $@

$(READY_TESTS): $(READY) tests/requirements.txt
	$(PIP) -r tests/requirements.txt -c requirements.lock
	@mkdir -p build
	-@$(PY) -m pip download --quiet --no-deps --dest build trl==0.11.4  # read by one test, not installed
	@touch $@

lab: $(READY)  ## set everything up, open JupyterLab on chapter 00
	@$(PY) -m classroom.lab

test: $(READY_TESTS)  ## run all tests, lectures and assignments (about 35 minutes on 2 cores)
	$(PYTEST)

test-fast: $(READY_TESTS)  ## run the tests that need no notebook (under 3 minutes)
	$(PYTEST) -m "not slow"

lectures: $(READY)  ## re-execute the lectures and store their outputs (ONLY=chapters/03_attention/lecture.ipynb)
	$(PY) -m classroom.execute $(ONLY)

assignments: $(READY)  ## write the released version of every assignment to build/release/
	$(PY) -m classroom.release

grade: $(READY)  ## autograde SUBMISSIONS=folder, write build/grades.csv and feedback pages
	@test -n "$(SUBMISSIONS)" || { echo "Say which folder: make grade SUBMISSIONS=path (holding student/chapter/assignment.ipynb)"; exit 2; }
	$(PY) -m classroom.grade "$(SUBMISSIONS)"

claims: $(READY)  ## print the ledger of executed claims
	@$(PY) -m minillm.teach.claims

kernels: $(READY)  ## compile every kernel for four GPUs (none is needed), print registers, spills, shared memory
	@TRITON_INTERPRET=0 $(PY) -m kernels.compile

bench: $(READY_TESTS)  ## measure speed and memory, write assets/benchmarks/ (about 5 minutes, quiet machine)
	@set -e; for script in tests/benchmarks/[!_]*.py; do echo "== $$script"; $(PY) $$script; done

capstone: $(READY)  ## raw text to a model that chats, with a report card (at most 40 minutes on 2 cores)
	$(PY) -m minillm.recipes.capstone

capstone-quick: $(READY)  ## the same with a smaller model (at most 5 minutes)
	$(PY) -m minillm.recipes.capstone --quick

lint: $(READY_TESTS)  ## check style, code and notebooks
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .

format: $(READY_TESTS)  ## apply the style
	$(VENV)/bin/ruff check --fix . && $(VENV)/bin/ruff format .

lock: $(READY)  ## resolve requirements.txt and tests/requirements.txt anew into requirements.lock
	$(PIP) uv
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --custom-compile-command "make lock" \
		requirements.txt tests/requirements.txt -o requirements.lock

clean:  ## remove what was built, keep the environment and the students' work/
	rm -rf build .pytest_cache .ruff_cache .hypothesis
	find minillm kernels tests chapters -name __pycache__ -prune -exec rm -rf {} +

clean-env: clean  ## remove the environment as well
	rm -rf $(VENV)
