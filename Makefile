# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first (Python 3.11+, gcc and pip needed).
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo cuda || echo cpu)
# one thread a process: two processes share two cores
THREADS = $(if $(filter cpu,$(DS_ACCELERATOR)),OMP_NUM_THREADS=1 )
PROCESSES = $(if $(filter cpu,$(DS_ACCELERATOR)),--num_accelerators 2,)
STAMP := $(VENV)/.installed

.PHONY: demo install test test-all test-transformers-oldest lint doctor clean

demo: install
	$(THREADS)deepspeed --log_level warning $(PROCESSES) launch/train.py --config launch/recipes/nano_demo.yaml

install: $(STAMP)

# DeepSpeed comes as source and imports torch in its set-up, so torch goes first and its build is not isolated.
# The doctor says what stops a run on this machine and leaves every package imported once.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel ninja py-cpuinfo
	$(BIN)/python -m pip install -q -c constraints.txt torch numpy
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	$(BIN)/python launch/doctor.py --prepare
	touch $(STAMP)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder

# The oldest transformers that pyproject.toml allows, with what depends on its version: the cache's plug and the models it reads.
# Its environment sees the packages of $(VENV) and puts the older transformers before them.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OLD_VENV := .venv-transformers-$(OLDEST)

test-transformers-oldest: $(OLD_VENV)/.installed
	OMP_NUM_THREADS=1 $(OLD_VENV)/bin/python -m pytest -m "not gpu" tests/cache

$(OLD_VENV)/.installed: $(STAMP)
	$(BIN)/python -m venv --without-pip $(OLD_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
	  > "$$($(OLD_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/underneath.pth"
	$(BIN)/python -m pip --python $(OLD_VENV)/bin/python install -q "transformers==$(OLDEST).*"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest tests/test_import_contracts.py

doctor: install
	$(BIN)/python launch/doctor.py

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
