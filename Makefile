# `make` or `make help` explains the targets. Every target does the set-up it needs by itself.

VENV ?= .venv
RUNS ?= runs
TESTS ?= tests
PY := $(VENV)/bin/python
# Some systems set NAME to the host's name: only `make finetune NAME=...` counts.
ifeq ($(origin NAME),environment)
NAME :=
endif

# The clone's code, also in processes that torchrun starts, whichever clone the environment was installed from.
export PYTHONPATH := $(CURDIR)
export PYTHON
# Ranks share the cores; without this each would start a thread per core.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup finetune test test-gpu bench check format clean

help:
	@echo "Megatron-MOO"
	@echo
	@echo "  make setup      build the environment (done by every other target; instant when nothing changed)"
	@echo "  make finetune   fine-tune a small GPT on many languages in 4 CPU processes; results in $(RUNS)/<name>/"
	@echo "                    METHOD=mean|mgda|pcgrad|cagrad|gradvac   GRANULARITY=bucket|layer|tensor|model"
	@echo "                    STEPS=n  NAME=name   ARGS='...' (any other option of examples/locale_tasks/run.py)"
	@echo "                    ^C saves a checkpoint; the same command resumes"
	@echo "  make test       run the tests          TESTS=tests/unit  ARGS='-k name -x'"
	@echo "  make test-gpu   run the tests that need a CUDA device (says so and passes without one)"
	@echo "  make bench      run the benchmarks     BENCH=name runs one; tables on screen, JSON in $(RUNS)/bench/"
	@echo "  make check      lint, format and import arrows"
	@echo "  make format     fix what ruff can fix"
	@echo "  make clean      remove caches and build leftovers; keeps the environment and $(RUNS)/"
	@echo
	@echo "Everywhere: PYTHON=/path/to/python3.12 (default: found by tools/find_python.sh), VENV=$(VENV)"

setup:
	@sh tools/setup_env.sh "$(VENV)"

# exec: ^C goes to the program, which saves a checkpoint before it ends.
finetune: setup
	@exec "$(PY)" examples/locale_tasks/run.py --runs "$(RUNS)" \
	    $(if $(METHOD),--method "$(METHOD)") $(if $(GRANULARITY),--granularity "$(GRANULARITY)") \
	    $(if $(STEPS),--steps "$(STEPS)") $(if $(NAME),--name "$(NAME)") $(ARGS)

test: setup
	@exec "$(PY)" -m pytest $(TESTS) --durations=15 $(ARGS)

test-gpu: setup
	@if "$(PY)" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	    exec "$(PY)" -m pytest tests/gpu --durations=15 $(ARGS); \
	else \
	    echo "test-gpu: no CUDA device here, nothing was run"; \
	fi

bench: setup
	@set -e; found=; for script in benchmarks/$(or $(BENCH),*).py; do \
	    case $$script in *'*'*|*/_*) continue;; esac; \
	    found=1; name=$$(basename "$$script" .py); echo "== $$name"; mkdir -p "$(RUNS)/bench"; \
	    "$(PY)" "$$script" --out "$(RUNS)/bench/$$name.json" $(ARGS); \
	done; \
	test -n "$$found" || { echo "error: this clone holds no benchmarks/*.py" >&2; exit 1; }

check: setup
	@failed=0; \
	"$(PY)" -m ruff check --output-format concise . || failed=1; \
	"$(PY)" -m ruff format --check . || failed=1; \
	"$(PY)" tools/check_imports.py || failed=1; \
	exit $$failed

format: setup
	@"$(PY)" -m ruff check --fix .
	@"$(PY)" -m ruff format .

clean:
	@find . \( -path ./.git -o -path "./$(VENV)" -o -path "./$(RUNS)" \) -prune -o \
	    -type d -name __pycache__ -prune -exec rm -rf {} +
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	@echo "clean: caches removed; kept $(VENV) and $(RUNS)/ (delete them by hand)"
