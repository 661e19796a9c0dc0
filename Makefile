# make quickstart: install into .venv, train on real digits, sample with 1 and 2 steps, score, report
# make page:       the trained digits model in one HTML file that draws in a browser
# make fashion:    the same on Fashion-MNIST, which is fetched or lies in data/fashion: half an hour
# make arena:      SoFlow beside other objectives on digits: half an hour, then tables
# make check:      lint, check types, run the quick tests: a minute or two
# make test:       install, lint, check types, run all tests
# make test-oldest: run what trains and samples on the oldest torch that is supported
# make faults:     kill, stop and damage runs in 546 ways; about eight minutes

# Installs with uv where it is found, else with pip (make UV= always uses pip).
UV ?= $(shell command -v uv)
# Which Python to use: make PYTHON=python3.12. Without it, uv finds one and pip takes python3.
PYTHON ?=
PIP_PYTHON = $(or $(PYTHON),python3)
CHECK_PYTHON = $(PIP_PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit( \
	"Python 3.11 to 3.13 is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)")'
DIGITS = runs/digits
PAGE = $(DIGITS)/digits.html
WORKERS ?= 2
# Files of tests run side by side; tests/conftest.py says in which order.
PYTEST = .venv/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
OLDEST_TESTS = models unet train learner optimizers ema sampling checkpoint processes
FASHION = runs/fashion
FASHION_STEPS = $(shell sed -n 's/^total_steps: *\([0-9]*\).*/\1/p' configs/fashion.yaml)

.PHONY: quickstart page fashion arena lint check test test-oldest faults clean

ifneq ($(UV),)
.venv/installed: pyproject.toml uv.lock
	@echo "Installing into .venv with uv: a few minutes, 8 GB"
	$(UV) sync --locked --all-groups $(if $(PYTHON),--python $(PYTHON))
	@touch $@
else
REQUIREMENTS = requirements_soflow.txt $(patsubst %,requirements_soflow_%.txt,eval demo dev)
.venv/installed: $(REQUIREMENTS)
	@$(CHECK_PYTHON)
	@echo "Installing into .venv with pip: a few minutes, 8 GB"
	$(PIP_PYTHON) -m venv .venv
	.venv/bin/pip install --disable-pip-version-check $(REQUIREMENTS:%=-r %)
	@touch $@
endif

# Train by config $(1), into folder $(2) for $(3) steps; make $(4) images by 1 and by 2 steps; judge.
define train_and_judge
	.venv/bin/python train.py --config $(1)
	@for nfe in 1 2; do \
		.venv/bin/python inference.py --config $(1) --ckpt-steps $(3) \
			--eval-NFE $$nfe --eval-batch-size 250 --num-samples $(4) --seed 42 \
			--labels 0,1,2,3,4,5,6,7,8,9 --grid $(2)/figs/$${nfe}NFE.png || exit 1; \
	done
	@.venv/bin/python quickstart/score.py $(2)/evals/$(3)_1NFE_42.npz $(2)/evals/$(3)_2NFE_42.npz
	@.venv/bin/python quickstart/score.py $(2)/evals > /dev/null
	@.venv/bin/python report.py $(2) > /dev/null
	@echo "Look at $(2)/figs/1NFE.png: made in one step, one row per class."
	@echo "Open $(2)/report.html: curves, samples and scores over training."
endef

quickstart: .venv/installed
	$(call train_and_judge,configs/digits.yaml,$(DIGITS),1000,1000)
	@if .venv/bin/python page.py $(DIGITS) $(PAGE) > $(DIGITS)/page.txt 2>&1; then \
		echo "Open $(PAGE): the model itself, which draws digits in your browser."; \
	else \
		echo "No page that draws digits in your browser: $$(tail -n 1 $(DIGITS)/page.txt)"; \
	fi

page: .venv/installed
	.venv/bin/python page.py $(DIGITS) $(PAGE)

fashion: .venv/installed
	$(call train_and_judge,configs/fashion.yaml,$(FASHION),$(FASHION_STEPS),5000)

arena: .venv/installed
	.venv/bin/python arena/run.py
	.venv/bin/python arena/tables.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

check: lint
	$(PYTEST) -m "not slow"

test: lint
	$(PYTEST)

# The oldest supported torch, with the torchvision released beside it.
.venv-oldest/installed: requirements_soflow.txt requirements_soflow_dev.txt
	@$(CHECK_PYTHON)
	$(PIP_PYTHON) -m venv .venv-oldest
	sed 's/^torch==.*/torch==2.7.1/; s/^torchvision==.*/torchvision==0.22.1/' $^ \
		> .venv-oldest/requirements.txt
	.venv-oldest/bin/pip install --disable-pip-version-check -r .venv-oldest/requirements.txt
	@touch $@

test-oldest: .venv-oldest/installed
	.venv-oldest$(PYTEST:.venv%=%) $(OLDEST_TESTS:%=tests/test_%.py)

faults: .venv/installed
	.venv/bin/python tests/faults.py

clean:
	rm -rf .venv .venv-oldest .pytest_cache .ruff_cache .mypy_cache
