# `make demo` and `make test` are the whole set-up on a fresh machine: each makes .venv and installs what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test slow test-oldest fuzz bench check clean

demo: .venv/base
	$(BIN)/headshare demo --overwrite

test: .venv/test
	$(BIN)/python -m pytest -n auto --dist worksteal

# What takes minutes: several processes that fail, whole runs in emulated buckets, large models.
slow: .venv/test
	$(BIN)/python -m pytest -m slow -n 1

# The fast part on the oldest releases that pyproject.toml admits, among which old ones warn of what new ones changed.
# PyTorch, of which old CPU builds are not on PyPI, is left out: what is compared with transformers is skipped; so is
# libtpu. Matching, refits and slimming run there as `test_compression.py` asks for them.
OLDEST := tests/test_config.py tests/test_parameters.py tests/test_rope.py tests/test_loading.py tests/test_compression.py \
	tests/sharing tests/evaluate/test_perplexity.py tests/model/test_attention.py tests/model/test_llama.py \
	tests/model/test_generate.py tests/model/test_share.py tests/convert/test_native.py tests/train/test_checkpoints.py

test-oldest: .venv-oldest/test
	HEADSHARE_TESTS_WITHOUT_TORCH=1 .venv-oldest/bin/python -m pytest -n auto --dist worksteal \
		-W ignore::DeprecationWarning --deselect tests/model/test_attention.py::test_kernels_are_for_tpus_and_whole_blocks \
		--deselect tests/model/test_attention.py::test_the_kernel_of_tpus_compiles_with_a_window \
		$(OLDEST)

# Inputs of every kind for FUZZ_MINUTES (30) in FUZZ_WORKERS processes; what fails is in build/fuzz, with a summary.
fuzz: .venv/test
	$(BIN)/python tests/fuzz/long.py

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

.venv-oldest/test: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct \
		--editable . 'pytest>=9' 'pytest-xdist>=3.8' 'hypothesis>=6.148'
	touch $@

bench: .venv/test
	$(BIN)/python bench/match.py
	$(BIN)/python bench/convert.py
	$(BIN)/python bench/fit.py
	$(BIN)/python bench/train.py
	$(BIN)/python bench/serve.py

clean:
	rm -rf .venv .venv-oldest build site *.egg-info
