# `make test`, `make quality`, ...: each in the environment at $VENV, made by `make env`.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(BIN)/python
SITE ?= site
DIST ?= dist

.PHONY: env style quality test docs schemas demo package

env:  ## the environment of the developers
	python3 -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[test,docs,demo]'

style:  ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality:  ## lint, format, types, imports between rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test:
	$(BIN)/pytest -n 2 --dist worksteal

docs:
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -q -d $(SITE)

schemas:  ## the JSON Schemas that the package ships
	for kind in study train objective recipe; do \
	    $(PYTHON) -m optimer_hf schema $$kind > optimer_hf/schemas/$$kind.json || exit 1; done

demo:
	$(BIN)/optimer run recipes/gemma-3-270m-demo

package:  ## the package as people get it: built, unpacked alone, and run away from the sources
	rm -rf $(DIST)
	$(PYTHON) -m hatchling build -d $(DIST)
	for file in $(DIST)/*.whl $(DIST)/*.tar.gz; do $(PYTHON) .ci/package.py $$file || exit 1; done
