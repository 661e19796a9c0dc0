# make quickstart: install, train on real digits, sample with 1 and 2 steps (5 minutes on 2 cores)
# make test:       install, lint, run the tests

PYTHON ?= python3
DIGITS = runs/digits
LABELS = 0,1,2,3,4,5,6,7,8,9

.PHONY: quickstart test clean

.venv/soflow: requirements_soflow.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; say which: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@echo "Installing into .venv: a few minutes, a few gigabytes"
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

.venv/dev: .venv/soflow requirements_soflow_eval.txt requirements_soflow_dev.txt
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements_soflow.txt \
		-r requirements_soflow_eval.txt -r requirements_soflow_dev.txt
	touch $@

quickstart: .venv/soflow
	.venv/bin/python train.py --config configs/digits.yaml
	@for nfe in 1 2; do \
		.venv/bin/python inference.py --config configs/digits.yaml --ckpt-steps 1000 \
			--eval-NFE $$nfe --eval-batch-size 250 --num-samples 1000 --seed 42 \
			--labels $(LABELS) --grid $(DIGITS)/figs/$${nfe}NFE.png || exit 1; \
	done
	@.venv/bin/python quickstart/check_digits.py \
		$(DIGITS)/evals/1000_1NFE_42.npz $(DIGITS)/evals/1000_2NFE_42.npz
	@echo "Look at $(DIGITS)/figs/1NFE.png: made in one step, one row per class."

test: .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache
