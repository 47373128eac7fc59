# `make demo` and `make test` are the whole set-up on a fresh machine: each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench check clean

demo: .venv/base
	$(BIN)/headshare demo --overwrite

test: .venv/test
	$(BIN)/python -m pytest -n auto --dist loadfile

check: .venv/test tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd .venv/tree && ../bin/lint-imports ../../pyproject.toml --no-cache
	MYPYPATH=.venv/tree $(BIN)/mypy -p headshare_jax

.PHONY: docs tree
# The site, in the folder site.
docs: .venv/docs tree
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Tools that cannot follow the mapping of convert/ and train/ into the package are shown the tree it makes.
tree: .venv/base
	rm -rf .venv/tree && mkdir -p .venv/tree
	cp -rp headshare_jax .venv/tree/ && cp -rp convert train .venv/tree/headshare_jax/

.venv/base: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# One release of PyTorch is named because an open range takes the newest CUDA build, several GB of it.
.venv/test: .venv/base
	$(BIN)/python -m pip install --quiet torch==2.13.0 --editable '.[test]'
	touch $@

.venv/docs: .venv/base
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

bench: .venv/test
	$(BIN)/python bench/match.py
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/fit.py
	$(BIN)/python bench/train.py
	$(BIN)/python bench/serve.py

clean:
	rm -rf .venv build site *.egg-info
