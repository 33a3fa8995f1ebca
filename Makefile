PYTHON ?= python3
TORCH  := torch>=2.8,<=2.13.0
VENV   := .venv
BIN    := $(VENV)/bin

# With an NVIDIA GPU: PyPI's CUDA build. Without: a CPU wheel at hand (pip's find-links), else PyTorch's CPU index.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: serve check fast test lint types stress bench clean up down lock check-images check-manifests compose-test

serve: $(VENV)/.serve
	$(BIN)/python -m app

# What to run after every change: a minute and a half on two cores, which it uses.
check: $(VENV)/.test
	@$(MAKE) --no-print-directory --output-sync --jobs 2 fast lint types

fast: $(VENV)/.test
	$(BIN)/python -m pytest -q -m "not slow" --numprocesses 2 --dist loadfile

# All tests, also those that wait for processes of their own.
test: $(VENV)/.test lint types
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# Our server beside others, each in an environment of its own that sees this one; see docs/benchmarks.md. Results go to
# build/serving. ARGS: --sweep (first, for the peers' settings), --quick, --only NAMES
PEERS := $(VENV)/peers
PURELIB := import sysconfig; print(sysconfig.get_path("purelib"))
bench: $(PEERS)/.done
	$(BIN)/python -m tests.bench.serving --venvs $(PEERS) $(ARGS)

$(PEERS)/.done: $(VENV)/.test $(wildcard tests/bench/serving/peers/*.txt)
	mkdir -p $(PEERS)
	for peer in litserve rayserve bentoml mosec; do \
	  $(BIN)/python -m venv $(PEERS)/$$peer && python=$(PEERS)/$$peer/bin/python \
	  && $(BIN)/python -c '$(PURELIB)' > $$($$python -c '$(PURELIB)')/project.pth \
	  && $$python -m pip install -q -r tests/bench/serving/peers/$$peer.txt || echo "$$peer cannot be installed"; done
	@touch $@

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then echo "NVIDIA GPU found: torch with CUDA"; $(BIN)/pip install -q "$(TORCH)"; \
	else echo "no GPU found: torch for the CPU"; \
	  $(BIN)/pip install -q --no-index --no-deps "$(TORCH)" 2>/dev/null \
	  || $(BIN)/pip install -q --index-url $(TORCH_CPU_INDEX) "$(TORCH)"; fi
	@touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e .
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/pip install -q -e ".[train,test]"
	@touch $@ $(VENV)/.serve

# Docker; see docs/deploy/docker.md. Without an NVIDIA GPU the CPU's image. FILES names more compose files.
COMPOSE = docker compose -f docker-compose.yml \
  $(shell nvidia-smi -L >/dev/null 2>&1 || echo -f docker-compose.cpu.yml) $(FILES:%=-f %)

up:
	$(COMPOSE) up -d --build --wait

down:
	$(COMPOSE) down

compose-test: $(VENV)/.test
	$(BIN)/python -m tests.docker.compose $(ARGS)

# Everything that may happen to a server: half an hour, ten minutes of it mixed load (MINUTES=60 for more); the report
# is build/stress.md. ARGS: --help lists the parts and their numbers.
stress: $(VENV)/.stress
	$(BIN)/python -m tests.stress --minutes $(or $(MINUTES),10) $(ARGS)

$(VENV)/.stress: $(VENV)/.test
	$(BIN)/pip install -q -e ".[stress]"
	@touch $@

TOOLS := $(VENV)/tools
$(TOOLS)/.done: docker/tools.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install -q -r docker/tools.txt
	@touch $@

# WHEELS: a folder with torch's CPU wheel, where PyTorch's index cannot be reached.
lock: $(TOOLS)/.done
	PATH="$(CURDIR)/$(TOOLS)/bin:$$PATH" $(TOOLS)/bin/python docker/lock.py $(WHEELS)

# Kubernetes' own schemas for what Kustomize makes; PodMonitor is the operator's, which tests/docker checks by hand.
check-manifests: $(TOOLS)/.done
	mkdir -p build
	for overlay in cpu gpu; do \
	  kubectl kustomize docker/kubernetes/$$overlay > build/kubernetes-$$overlay.yaml \
	  && $(TOOLS)/bin/kubernetes-validate --strict build/kubernetes-$$overlay.yaml || exit 1; done

check-images: check-manifests
	$(TOOLS)/bin/hadolint docker/Dockerfile
	$(TOOLS)/bin/python docker/grafana/dashboard.py && git diff --exit-code --stat docker/grafana
	mkdir -p build
	cat docker/requirements.txt docker/torch-cpu.txt | $(TOOLS)/bin/cyclonedx-py requirements --output-reproducible -o build/sbom-cpu.json -
	cat docker/requirements.txt docker/torch-cuda.txt | $(TOOLS)/bin/cyclonedx-py requirements --output-reproducible -o build/sbom-cuda.json -
	$(TOOLS)/bin/pip-audit --strict --require-hashes --disable-pip -r docker/requirements.txt -r docker/torch-cuda.txt

clean:
	rm -rf $(VENV) build dist *.egg-info
