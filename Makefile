# make demo    the whole job on this machine: Japanese speech in, a distilled Whisper and its error rates out
# make test    the tests
# make chaos   the chain, killed and disturbed 50 times, against a run that was not; CHAOS_ARGS="--kinds damage" for others
# make mutants one-line faults in copies of the scripts, each of which a test must notice
# make lint    the style
# make bench-labelling, bench-filtering, bench-distillation, ...    speed, against a plain baseline in the same run

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo test chaos mutants lint clean
.DEFAULT_GOAL := test

$(INSTALLED): requirements.txt constraints.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt -r tests/requirements.txt -c constraints.txt
	touch $@

demo: $(INSTALLED)
	$(BIN)/python -m tests.sandbox.demo $(DEMO_ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

chaos: $(INSTALLED)
	$(BIN)/python -m tests.sandbox.chaos $(CHAOS_ARGS)

mutants: $(INSTALLED)
	$(BIN)/python -m tests.mutants $(MUTANTS_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

bench-%: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.bench_$* $(BENCH_ARGS)

clean:
	rm -rf .venv demo
