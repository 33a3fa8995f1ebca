PYTHON ?= python3
TORCH  := torch>=2.8,<=2.13.0
VENV   := .venv
BIN    := $(VENV)/bin

# With an NVIDIA GPU: PyPI's CUDA build. Without: a CPU wheel at hand (pip's find-links), else PyTorch's CPU index.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: serve test lint types clean

serve: $(VENV)/.serve
	$(BIN)/python -m app

test: $(VENV)/.test lint types
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

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

clean:
	rm -rf $(VENV) build dist *.egg-info
