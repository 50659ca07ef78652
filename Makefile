# `make run` and `make test` need Python 3.11, make and the package registry, nothing else.
PYTHON ?= python3.11
VENV := .venv
PARITY_VENV := .venv-parity
BENCH_VENV := .venv-bench
OUT ?= run_6
PARITY ?=

.PHONY: setup run test check parity torture torture-saelens fuzz bench-env results clean

setup: $(VENV)/.ready

# torch first and pinned: left to itself, pip would bring the newest build with several GB of CUDA.
$(VENV)/.ready: pyproject.toml requirements/torch.txt requirements/triton.txt requirements/locked.txt requirements/data.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; install Python 3.11, or give PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements/torch.txt
	$(VENV)/bin/python -c "import triton" 2>/dev/null || $(VENV)/bin/pip install --quiet -r requirements/triton.txt
	$(VENV)/bin/pip install --quiet -r requirements/locked.txt
	$(VENV)/bin/pip install --quiet --no-deps --require-hashes -r requirements/data.txt
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

run: setup
	$(VENV)/bin/python experiment.py --out_dir=$(OUT)

# Two at a time, each on one thread; a file's tests share what they set up.
test: setup
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(MAKE) test

torture: setup
	$(VENV)/bin/python benchmarks/torture.py --json build/torture.json

# In the same environment as `parity`, whose sae-bench brings sae-lens.
torture-saelens: setup $(PARITY_VENV)/.ready
	$(VENV)/bin/python -m benchmarks.torture_saelens --saelens $(PARITY_VENV)/bin/python --json build/torture_saelens.json

fuzz: setup
	$(VENV)/bin/python benchmarks/fuzz.py --json build/fuzz.json

# Ours against sae-bench, which has an environment of its own. It brings the newest torchvision, which fits no pinned
# torch and which it never uses.
$(PARITY_VENV)/.ready: requirements/torch.txt requirements/parity.txt
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/pip install --quiet -r requirements/torch.txt
	$(PARITY_VENV)/bin/pip install --quiet -r requirements/torch.txt -r requirements/parity.txt
	$(PARITY_VENV)/bin/pip uninstall --quiet --yes torchvision
	touch $@

parity: setup $(PARITY_VENV)/.ready
	$(VENV)/bin/python -m benchmarks.parity.check --python $(PARITY_VENV)/bin/python $(PARITY)

# SAELens, dictionary_learning and sparsify: the rivals of benchmarks/train_step.py.
$(BENCH_VENV)/.ready: requirements/torch.txt requirements/bench.txt requirements/rivals.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/pip install --quiet -r requirements/torch.txt
	$(BENCH_VENV)/bin/pip install --quiet -r requirements/torch.txt -r requirements/bench.txt
	$(BENCH_VENV)/bin/pip install --quiet --no-deps -r requirements/rivals.txt
	touch $@

bench-env: $(BENCH_VENV)/.ready

# The tables of the benchmarks, from their result files.
results: setup
	mkdir -p build
	$(VENV)/bin/python -m benchmarks.results docs/results/*.json > build/RESULTS.md
	mv build/RESULTS.md benchmarks/RESULTS.md

clean:
	rm -rf $(VENV) $(PARITY_VENV) $(BENCH_VENV)
