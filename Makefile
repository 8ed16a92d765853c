# Everything runs in .venv, which `make setup` fills; the system's Python is never changed.
# Settings: RECIPE, SET ("train.lr=1e-4 train.steps=50"), ARGS (for pytest), WORKERS (test files at a time),
# PYTHON (3.11 or 3.12), PROFILE, VERSION and IMAGES ("cpu=... train=... serve=...") for register.

RECIPE ?= workflows/recipes/demo.yaml
SET ?=
ARGS ?=
PROFILE ?= local
VERSION ?=
IMAGES ?=
WORKERS ?= 3
PYTHON ?=

PINS := pyproject.toml $(wildcard docker/*.sh docker/*.txt) docker/pycosat/pyproject.toml docker/pycosat/pycosat.py
# In the order of the files, the long ones first. Three on two cores: many tests mostly wait for processes.
PYTEST = .venv/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
RUN = $(if $(strip $(SET)),.controlllm/recipe.yaml,$(RECIPE))

export PYTHON
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup finetune contrast register test test-fast test-all lint lock clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: .venv/.installed-main  ## install into .venv (once; every target below does it by itself)

finetune: .venv/.installed-main  ## run the pipeline: RECIPE=file.yaml SET="train.lr=1e-4 ..."
ifneq ($(strip $(SET)),)
	@mkdir -p .controlllm
	.venv/bin/controlllm config show "$(RECIPE)" $(SET) > "$(RUN)"
endif
	.venv/bin/controlllm config check "$(RUN)"
	.venv/bin/pyflyte run workflows/finetune.py finetune --config "$(RUN)"

contrast:  ## the same training without control: what gets forgotten
	@$(MAKE) --no-print-directory finetune RECIPE=workflows/recipes/demo-contrast.yaml

register: .venv/.installed-main  ## register with Flyte: PROFILE=one-gpu VERSION=1 IMAGES="cpu=... train=..."
	.venv/bin/controlllm cluster register --profile "$(PROFILE)" --version "$(VERSION)" $(foreach image,$(IMAGES),--image "$(image)")

test: .venv/.installed-dev  ## everything but the slow tests; ARGS="-k pack"
	$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-fast: .venv/.installed-dev  ## unit tests only
	$(PYTEST) -m "not slow and not gpu and not flow and not distributed" $(ARGS)

test-all: .venv/.installed-dev  ## the slow ones too
	.venv/bin/pytest -m "not gpu" $(ARGS)

lint: .venv/.installed-dev  ## ruff, pyright, import-linter
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	.venv/bin/lint-imports

lock:  ## write docker/constraints.txt anew from pyproject.toml (FRESH=1: newest versions)
	docker/lock.sh $(if $(FRESH),fresh)

clean:  ## remove what runs made
	rm -rf .controlllm runs

distclean: clean  ## remove the installation too
	rm -rf .venv .venv-uv *.egg-info docker/pycosat/*.egg-info docker/pycosat/build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed-main: $(PINS)
	docker/install.sh demo,serve-cpu
	@touch $@

.venv/.installed-dev: .venv/.installed-main
	docker/install.sh demo,serve-cpu,language,benchmarks,hdfs,s3,gs,deepspeed,quant,trackers,dev
	@touch $@
