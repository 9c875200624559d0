# make run  [ARGS="peft=none trainer.max_steps=5"]   set up and fine-tune: the default run, or what ARGS say
# make docs                                          set up and build the documentation into site/
# make test [ARGS="tests/data -k packing"]           set up and test
# make test-all                                      the tests that take longer than CI has, as well
# make coverage                                      as test, counting the lines of the package that commands run too
# make upstream                                      what the newest Megatron-Bridge and Core would change (docs/upstream.md)
.PHONY: run test test-all coverage upstream docs lint format setup wheel clean help
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
JOBS := 2
PYTEST := $(PYTHON) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
SETUP := scripts/uv.sh scripts/setup.sh pyproject.toml uv.lock

help:
	@sed -n 's/^# //p' Makefile; echo 'make setup | lint | format | wheel | clean'

run: .venv/.setup-run
	@$(PYTHON) -m posttrain $(ARGS)

test: .venv/.setup-test
	$(PYTEST) --cov --cov-report= $(ARGS)
	@echo "Lines of the package that ran in the test processes: $$($(PYTHON) -m coverage report --format=total) %"

test-all: .venv/.setup-test
	POSTTRAIN_TEST_ALL=1 $(PYTEST) $(ARGS)

coverage: .venv/.setup-test
	$(PYTEST) --cov --cov-config=tests/coverage.ini --cov-report=term:skip-covered $(ARGS)

upstream: .venv/.setup-test
	$(PYTHON) scripts/upstream.py $(ARGS)

docs: .venv/.setup-test
	.venv/bin/mkdocs build --quiet

lint: .venv/.setup-test
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports
	.venv/bin/mypy

format: .venv/.setup-test
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

setup: .venv/.setup-test

## Each stamp is newer than the lock that its environment was made from. What `run` needs, `test` needs too.
.venv/.setup-run: $(SETUP)
	scripts/setup.sh demo slurm
	@touch $@

.venv/.setup-test: $(SETUP)
	scripts/setup.sh demo dev slurm sweep docs eval excel
	@touch $@ .venv/.setup-run

wheel: .venv/.setup-run
	@rm -rf dist
	scripts/uv.sh build --wheel

clean:
	rm -rf .venv .venv-upstream .tools dist build site .pytest_cache .coverage .ruff_cache .mypy_cache .grimp_cache .hypothesis
