# Everything works from a bare Python 3.11 (constraints.txt is for that) and a C++ compiler: `make test` installs what it needs.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= $(shell nproc)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH_INSTALLED := $(VENV)/.torch
BENCH_INSTALLED := $(VENV)/.bench
RESULTS := benchmarks/results
ADAPTERS_INSTALLED := $(VENV)-adapters/.installed

# Unlike `-c`, these also hold in the isolated environment that builds the package.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-adapters models lint gpu carry bench measure invariants report install clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## prune a small network with every criterion: table and picture in out/
	$(BIN)/singe demo --out out

test: $(INSTALLED)  ## the whole suite, ruff and mypy included; ARGS="-k name" chooses, JOBS=1 for one process
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-adapters: $(ADAPTERS_INSTALLED)  ## adapters, attention and Lightning: what needs libraries that no test dependency brings
	$(VENV)-adapters/bin/python -m pytest tests/test_adapters_libraries.py tests/test_heads_libraries.py \
		tests/test_docs.py::test_the_example_with_lightning $(ARGS)

models: $(ADAPTERS_INSTALLED)  ## check the invariants on every architecture of docs/models.md (an hour)
	$(VENV)-adapters/bin/python -m benchmarks.coverage $(ARGS)

lint: $(INSTALLED)  ## ruff and mypy alone
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu:  ## everything that needs a CUDA device, with the torch that is there (see benchmarks/gpu.sh)
	bash benchmarks/gpu.sh

carry:  ## fill .carry/ with what a GPU machine without a network lacks: wheels, data, models, the commit
	mkdir -p .carry/wheels
	echo "$$(git rev-parse --short=12 HEAD) $$(git diff --quiet HEAD -- . ':!benchmarks/results' ':!docs' && echo clean || echo dirty)" >.carry/commit
	$(PYTHON) -m pip download -q --no-deps -d .carry/wheels $$(grep -E '^(torch-pruning|captum)==' constraints.txt)
	cp -rn "$${SINGE_DATA:-../shared}"/data "$${SINGE_DATA:-../shared}"/models .carry/

# pytest says 5 where ARGS chooses nothing of a file.
bench: $(BENCH_INSTALLED)  ## the whole benchmark matrix and the peers, hours; ARGS="-k resnet20" chooses
	$(BIN)/python -m pytest benchmarks/bench_scoring.py --device cpu --benchmark-json=$(RESULTS)/suite-cpu.json $(ARGS) || [ $$? = 5 ]
	$(BIN)/python -m pytest benchmarks/bench_peers.py --device cpu --benchmark-json=$(RESULTS)/peers-cpu.json $(ARGS) || [ $$? = 5 ]

# Each step writes its own file; one that fails does not keep the others from running. Threads are
# pinned for the kernels alone: a pinned process would hand its one core on to those it starts.
measure: $(BENCH_INSTALLED)  ## what docs/performance.md shows, on a quiet CPU, in 20 minutes (needs SINGE_DATA or ../shared)
	-$(BIN)/python -m benchmarks.targets --device cpu
	-$(BIN)/python -m pytest benchmarks/bench_scoring.py --device cpu --reduced --rounds 2 --benchmark-json=$(RESULTS)/suite-cpu.json
	-$(BIN)/python -m pytest benchmarks/bench_peers.py --device cpu --rounds 2 --benchmark-json=$(RESULTS)/peers-cpu.json
	-$(BIN)/python -m benchmarks.growth --device cpu
	-OMP_PROC_BIND=close OMP_PLACES=cores $(BIN)/python -m benchmarks.kernels --device cpu
	$(BIN)/python -m benchmarks.report

invariants: $(BENCH_INSTALLED)  ## what tests only sample, in full: every unit removed, every budget, 20 kills (an hour)
	$(BIN)/python -m benchmarks.removal
	$(BIN)/python -m benchmarks.budgets
	$(BIN)/python -m benchmarks.latency
	$(BIN)/python -m benchmarks.resume

report: $(BENCH_INSTALLED)  ## rewrite docs/performance.md and its pictures from benchmarks/results
	$(BIN)/python -m benchmarks.report

install: $(INSTALLED)  ## create .venv with pinned versions and the compiled core

clean:  ## remove .venv, builds and caches
	rm -rf $(VENV) $(VENV)-adapters build dist out *.egg-info singe/*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: it is the one download that takes minutes.
$(TORCH_INSTALLED): constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	touch $@

# torchvision (test models) without dependencies: nothing of it may replace the torch above.
$(INSTALLED): $(TORCH_INSTALLED) pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
	$(BIN)/python -m pip install -e '.[demo,export,test]'
	$(BIN)/python -m pip install --no-deps torchvision==0.28.0 pillow
	touch $@

# captum wants a torch: the constraints keep the one that is there.
$(BENCH_INSTALLED): $(INSTALLED) constraints.txt
	$(BIN)/python -m pip install captum pytest-benchmark
	touch $@

# On top of the first environment, whose packages it sees and never changes. Without dependencies, as these
# libraries ask for others than the pinned ones; what they import is listed in constraints-adapters.txt.
$(ADAPTERS_INSTALLED): $(INSTALLED) constraints-adapters.txt
	$(PYTHON) -m venv $(VENV)-adapters
	echo "$(CURDIR)/$(VENV)/lib/$$(ls $(VENV)/lib)/site-packages" > \
		$$(echo $(VENV)-adapters/lib/*/site-packages)/base.pth
	$(VENV)-adapters/bin/python -m pip install --no-deps -r constraints-adapters.txt
	touch $@
