# The two commands of the README and what they need. Every path is relative, so a checkout may be anywhere.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint style types docs clean

quickstart: .venv/ready
	$(BIN)/python -m examples.quickstart.run

# Three workers on two cores, because tests of several processes wait a lot; the files with whole runs come first.
test: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: .venv/ready
	$(MAKE) --no-print-directory --jobs 2 --output-sync style types

style:
	$(BIN)/python -m flake8 train.py models utils examples tests docs

types:
	$(BIN)/python -m mypy

docs: .venv/ready
	$(BIN)/python -m utils.config.document > docs/configuration.md
	$(BIN)/python -m docs.draw_plots
	$(BIN)/python -m docs.list_files
	$(BIN)/python -m docs.list_optimizers

# diffsynth is needed only for the three tokenizers of SD3 that it contains; its code is not run, so its dependencies are not
# installed. DeepSpeed's own launcher script does not start if the path of the checkout has spaces.
.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "Python 3.11 to 3.13 is needed; $(PYTHON) is $$($(PYTHON) --version). Choose one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps diffsynth==1.1.9
	printf '#!/bin/sh\nexec "$$(dirname "$$0")/python" -m deepspeed.launcher.runner "$$@"\n' > $(BIN)/deepspeed
	touch $@

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache
