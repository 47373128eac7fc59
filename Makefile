# `make demo` and `make test` are the whole set-up on a fresh machine: each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench check clean

demo: .venv/base
	$(BIN)/headshare demo --overwrite

test: .venv/test
	$(BIN)/python -m pytest -n auto --dist loadfile

# The type checker cannot follow the mapping of convert/ and train/ into the package, so it is shown the tree it makes.
check: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .venv/typed && mkdir -p .venv/typed/headshare_jax
	ln -s $(CURDIR)/headshare_jax/* $(CURDIR)/convert $(CURDIR)/train .venv/typed/headshare_jax/
	MYPYPATH=.venv/typed $(BIN)/mypy -p headshare_jax

.venv/base: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# One release of PyTorch is named because an open range takes the newest CUDA build, several GB of it.
.venv/test: .venv/base
	$(BIN)/python -m pip install --quiet torch==2.13.0 --editable '.[test]'
	touch $@

bench: .venv/test
	$(BIN)/python bench/match.py
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/fit.py
	$(BIN)/python bench/train.py
	$(BIN)/python bench/serve.py

clean:
	rm -rf .venv build *.egg-info
