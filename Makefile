# `make report` and `make test` need Python 3.11 or newer and nothing else; `make help` lists the rest.
#
#   make report STUDY=tofu-scratch CONFIG="tofu_dir=data/tofu scale=tiny"
#   make .venv PYTHON=/opt/python3.11/bin/python3 PIP_OPTIONS="--no-cache-dir"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first that is new enough and can make environments.
# An active .venv of this folder does not count: it may be about to be rebuilt.
PYTHON ?= $(shell mine='$(CURDIR)/.venv/bin:'; PATH="$${PATH//"$$mine"/}"; \
	for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2> /dev/null \
		&& command -v $$name && break; done)
UNIT := unit and not slow and not long
MARKERS ?= $(UNIT)
# Processes that run tests side by side, of one thread each. Tests of SLURM share one cluster, which
# some of them break: they run one after another.
WORKERS ?= $(if $(filter slurm,$(firstword $(MARKERS))),0,2)
READY := .venv/ready

# Rules and tests start `python`, which is then the environment's.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PYTHONPATH := $(CURDIR)/workflow

# Set the shell array `options` to the arguments of --config. Make passes STUDY and CONFIG in the
# environment, so that no shell runs their content. Words of CONFIG may be in quotes.
export STUDY CONFIG GPUS DEVICE
OPTIONS = options=(); [ -z "$$STUDY" ] || options+=("study=$$STUDY"); \
	words=$$([ -z "$$CONFIG" ] || xargs -n 1 printf '%s\n' <<< "$$CONFIG"); \
	while IFS= read -r word; do [ -z "$$word" ] || options+=("$$word"); done <<< "$$words"
GIVEN = $${options[@]+"$${options[@]}"}

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

.PHONY: .venv
.venv: $(READY) ## the environment, from envs/requirements.txt

# The stamp comes last: an installation that was interrupted is started afresh.
$(READY): envs/requirements.txt
	@[ -n "$(PYTHON)" ] || { echo "no Python 3.11 or newer with venv is in the path; on Debian:" \
		"apt-get install python3-venv; elsewhere: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	rm -rf .venv
	"$(PYTHON)" -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) \
		--requirement envs/requirements.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --editable .
	touch $@

.PHONY: report
report: $(READY) ## train, measure and render the study; STUDY=... and CONFIG="key=value ..." choose
	@$(OPTIONS); snakemake reports/tradeoff.html $${options[@]+--config "$${options[@]}"}
	@echo "$$PWD/reports/tradeoff.html"

.PHONY: plan
plan: $(READY) ## forecast jobs, GPU-hours, time, memory, disk: STUDY=... GPUS=32 DEVICE=H100
	@$(OPTIONS); python -m forgetting.pipeline.resources.forecast_cli $(if $(GPUS),--gpus "$$GPUS") \
		$(if $(DEVICE),--device "$$DEVICE") -- $(GIVEN)

.PHONY: status
status: $(READY) ## jobs of a study that are finished, running, pending, to come: STUDY=...
	@$(OPTIONS); python -m forgetting.pipeline.status -- $(GIVEN)

.PHONY: dry-runs
dry-runs: $(READY) ## plan every study under both profiles, offline
	@printf '%s\n' config/studies/*.yaml | xargs -P 2 -n 1 $(SHELL) $(.SHELLFLAGS) \
		'for profile in default slurm; do \
			options=$$([ $$profile = default ] || echo --profile $$profile); \
			plan=$$(snakemake --dry-run $$options --config "study=$$0" 2>&1) \
				|| { echo "$$plan"; echo "no plan: $$0, profile $$profile" >&2; exit 1; }; \
			echo "planned: $$0, profile $$profile: $$(grep -m 1 "^total" <<< "$$plan" | tr -s " ") jobs"; \
		done'

# worksteal: each worker takes a run of files in their order, so that most fixtures of a module are
# made once, and one that has no tests left takes half of those that another still has. With loadfile
# or loadscope a long file that comes late keeps one worker busy while the other waits.
PYTEST = pytest -n $(WORKERS) --dist worksteal

.PHONY: test
test: $(READY) ## the fast unit tests; MARKERS=slurm TESTS=tests/slurm and the like: others
	$(PYTEST) -m "$(MARKERS)" $(TESTS)
	@echo "Left out: all tests not marked \"$(MARKERS)\"; make test-all runs the other tiers (tests/README.md)"

.PHONY: test-all
test-all: test ## all tests that need no cluster, but for those of many minutes
	$(PYTEST) -m "not ($(UNIT)) and not long and not slurm"
	@echo "Left out: tests of many minutes (make test MARKERS=long) and of SLURM (tests/README.md)"

.PHONY: bench-train
bench-train: .venv/ready-bench ## training speed against Trainer and trl; BENCH="--data FILE ..." sets more
	python bench/train.py $(BENCH)

.PHONY: bench-score
bench-score: $(READY) ## scoring speed against lm-eval and TOFU's way; BENCH="--data FOLDER ..."
	python bench/score.py $(BENCH)

.PHONY: bench-plan
bench-plan: $(READY) ## how long sweeps of 1,000 and 10,000 runs take to plan
	python bench/plan.py

.PHONY: kubernetes
kubernetes: .venv/ready-kubernetes ## what profiles/kubernetes needs in addition

.venv/ready-kubernetes: $(READY) envs/kubernetes.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) \
		--requirement envs/kubernetes.txt --constraint envs/requirements.txt
	touch $@

.venv/ready-bench: $(READY) envs/bench.txt
	.venv/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) \
		--requirement envs/bench.txt --constraint envs/requirements.txt
	touch $@

.PHONY: lint
lint: $(READY) ## style, types, workflow, generated files
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	snakefmt --check Snakefile workflow/rules
	snakemake --lint
	python -m forgetting.config.schema --check
	python docs/rulegraph.py --check

.PHONY: schema
schema: $(READY) ## write config/schema.json and config/README.md
	python -m forgetting.config.schema --write

.PHONY: rulegraph
rulegraph: $(READY) ## write the graph of the rules into docs/architecture.md
	python docs/rulegraph.py

.PHONY: clean
clean: ## remove the environment and the tools' caches; results stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
