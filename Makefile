# `make help` lists the targets. PYTHON picks the interpreter that makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

# tests never reach for the network; one thread is fastest for models this small, and does not fight for cores
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 MPLBACKEND=Agg
# two steps of every stage: proves that the pipeline runs, not that it learns
SMOKE := name=smoke run_dir=runs/smoke data.synthetic.num_train=256 data.synthetic.num_validation=16 \
	data.validation_size=16 data.synthetic.num_test=16 train.max_steps=2 train.eval_every=2 \
	train.eval_examples=8

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow smoke check format docs release docs-config

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install the package with its pinned dependencies (once)

$(STAMP): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup ## train, measure and export a small latent reasoner on the CPU; ARGS="seed=1 ..." overrides
	$(BIN)/latent-sft run configs/quickstart.yaml $(ARGS)

test: setup ## the tests, under ten minutes on two cores; ARGS="-k name" goes to pytest
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: setup ## the tests marked slow; installs what some of them run: lm-eval, a browser, trackers, docs, release tools
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[lm-eval,browser,docs,release]' wandb mlflow-skinny sqlalchemy alembic
	$(TEST_ENV) $(BIN)/python -m pytest -m slow $(ARGS)

smoke: setup ## every stage for two steps, in a fresh runs/smoke
	rm -rf runs/smoke
	$(BIN)/latent-sft run configs/quickstart.yaml $(SMOKE) $(ARGS)

check: setup ## lint, formatting and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch .ci/run
	$(BIN)/hadolint launch/Dockerfile

format: setup ## fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup ## the site of docs/ in site/, strictly: a broken link or a missing name is an error
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

release: setup ## wheel and sdist in dist/, checked; publishes nothing
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[release]'
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

docs-config: setup ## write docs/configuration.md again from config/schema.py
	$(BIN)/python -m latent_sft.config.document docs/configuration.md
