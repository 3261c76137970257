# Every command of this project. All but help, lock and clean first make .venv hold what they need, from the locks in
# requirements/; no root needed.
#   export ENGINE=cuda         on a machine with an NVIDIA GPU (the default is cpu); a command without it makes .venv anew
#   PYTHON=python3.12 make ... another interpreter than python3
SHELL := bash
MODEL ?=
ARGS ?=
BIN := .venv/bin
# A path that a command adds to sys.path must not shadow installed packages (kernels/ is also a package of Hugging Face).
export PYTHONSAFEPATH := 1
.DEFAULT_GOAL := help
.PHONY: help serve test check bench train generate openapi lock build clean run-venv dev-venv

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

serve: run-venv ## start the server on the embedded model (MODEL=directory-or-name ARGS="--port 9000")
	@$(BIN)/thinkserve serve $(MODEL) $(ARGS)

test: dev-venv ## lint, types and all tests (ARGS="tests/server -k stream" for some)
	@scripts/check
	@$(BIN)/pytest $(ARGS)

check: dev-venv ## lint and types only
	@scripts/check

bench: dev-venv ## measure: accuracy, tokens and time per strategy, beside vLLM's own server (ARGS="--quick")
	@$(BIN)/python bench/run.py $(ARGS)

train: dev-venv ## train the embedded model family again (ARGS="--help" shows the choices)
	@$(BIN)/python -m thinkserve.train $(ARGS)

generate: dev-venv ## rewrite what is generated: openapi.yaml, README's strategy table
	@scripts/gen

openapi: generate ## the same, by its best known part

lock: ## resolve requirements/*.txt again (ARGS=--upgrade for the newest of everything)
	@scripts/lock $(ARGS)

build: dev-venv ## build the wheel into dist/
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove .venv, caches and everything built
	rm -rf .venv .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

run-venv:
	@scripts/setup run

dev-venv:
	@scripts/setup dev
