# `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
DIGITS := data/digits
CONFIG := configs/digits/yolov5_n_digits.py
WORK_DIR := work_dirs/digits
EVIDENCE := work_dirs/evidence
ABLATE := $(RUN) -m mmema ablate --out $(EVIDENCE)
ARGS ?=
DEVICE ?= cuda
JOBS ?= 2
PYTEST := $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
SEED ?= $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help setup train evidence gpu test quick extensive stacks site clean

help:  ## print this list
	@echo 'usage: make TARGET'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make .venv with torch, mmcv, mmdet, mmyolo and mmema (minutes, once)

train: $(READY)  ## train YOLOv5-n with a restartable EMA on digits (to go on: make train ARGS=--resume)
	$(RUN) tools/make_digits.py $(DIGITS)
	$(RUN) tools/train.py $(CONFIG) --work-dir $(WORK_DIR) $(ARGS)
	@echo 'The last average on the test set, on which nothing was chosen:'
	$(RUN) tools/test.py $(CONFIG) $$(cat $(WORK_DIR)/last_checkpoint) --work-dir $(WORK_DIR)/test

evidence: $(READY)  ## run the experiment of docs/evidence.md: 30 trainings, hours; goes on where it was
	@echo '30 trainings, about 3 hours on 2 cores. Stop it at any time: the same call goes on where it was.'
	$(RUN) tools/make_digits.py $(DIGITS)
	$(ABLATE) configs/digits/yolov5_n_ablation.py --seeds 12 $(ARGS)
	$(ABLATE) configs/digits/yolov5_n_ablation_fifth.py --seeds 6 $(ARGS)
	$(ABLATE) configs/digits/rtmdet_tiny_ablation.py --seeds 6 $(ARGS)
	$(ABLATE) configs/digits/rtmdet_tiny_ablation_fifth.py --seeds 6 $(ARGS)

gpu:  ## test and measure on a GPU, without set-up: PYTHON is one that has torch and MMEngine
	$(PYTHON) benchmarks/gpu_report.py --device $(DEVICE) $(ARGS)

test: $(READY)  ## check style and types and run the tests: about 10 minutes on 2 cores (more cores: JOBS=4)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(PYTEST) $(ARGS)

quick: $(READY)  ## run the fast tests, for after each edit
	$(PYTEST) -m 'not slow and not extensive' -q $(ARGS)

extensive: $(READY)  ## run every test there is, random ones with a new seed (again: SEED=12)
	export MMEMA_SEED=$(SEED) && $(PYTEST) -m '' --hypothesis-seed=$$MMEMA_SEED $(ARGS)

stacks: $(READY)  ## install and test every stack of docs/stacks.md: an hour (one: ARGS='-s alone table')
	JOBS=$(JOBS) $(RUN) -m nox $(ARGS)

site: $(READY)  ## build the site of docs/ into site/, with its links checked
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)

clean:  ## remove .venv, data and caches; keep work_dirs and the compiled mmcv
	rm -rf $(VENV) .nox data build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .dist_test
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): tools/bootstrap.py requirements/stack.txt requirements/docs.txt pyproject.toml
	$(PYTHON) tools/bootstrap.py $(VENV)
	@touch $@
