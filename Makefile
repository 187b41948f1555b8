# make demo: the main job, from a bare machine to a table and a plot.   make test: the tests.   make check: format, lint, types, layers.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all fuzz check format cards numbers docs constraints clean

demo: $(READY)
	$(BIN)/python benchmarks/demo.py

# Files of tests are dealt out to WORKERS processes of one thread each.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

test-all: $(READY)
	$(BIN)/python -m pytest -q -m 'not gpu and not network'

# 100,000 damaged copies of a learngene: each refused, or loaded to exactly the original tensors.
fuzz: $(READY)
	$(BIN)/python tests/mutants.py 100000

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# README.md's and the cards' numbers, from the artefacts and the files under benchmarks/results/.
cards numbers: $(READY)
	$(BIN)/python benchmarks/write_numbers.py

# docs/api.md and docs/cli.md, from docstrings and --help; and the same as a site, build/docs/index.html.
docs: $(READY)
	$(BIN)/python docs/reference.py
	$(BIN)/pdoc learngene_hub --docformat google --output-directory build/docs

# Once: the environment, uv by pip, everything else by uv (seconds instead of minutes).
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'
	touch $@

# The newest versions of everything, as pins; then run `make check test` before committing them.
constraints: $(READY)
	echo uv | $(BIN)/uv pip compile --quiet --upgrade --universal --no-header --no-annotate \
		--extra dev --extra datasets pyproject.toml - --output-file constraints.txt

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
