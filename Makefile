# `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
DIGITS := data/digits
CONFIG := configs/digits/yolov5_n_digits.py
WORK_DIR := work_dirs/digits
ARGS ?=
JOBS ?= 2
PYTEST := $(RUN) -m pytest -n $(JOBS) --dist loadfile
SEED ?= $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help setup train test quick extensive clean

help:  ## print this list
	@echo 'usage: make TARGET'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make .venv with torch, mmcv, mmdet, mmyolo and mmema (minutes, once)

train: $(READY)  ## train YOLOv5-n with a restartable EMA on digits (to go on: make train ARGS=--resume)
	$(RUN) tools/make_digits.py $(DIGITS)
	$(RUN) tools/train.py $(CONFIG) --work-dir $(WORK_DIR) $(ARGS)

test: $(READY)  ## check the style and run the tests: 8 minutes on 2 cores (more cores: JOBS=4)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(PYTEST) $(ARGS)

quick: $(READY)  ## run the fast tests, for after each edit
	$(PYTEST) -m 'not slow and not extensive' -q $(ARGS)

extensive: $(READY)  ## run every test there is, random ones with a new seed (again: SEED=12)
	MMEMA_SEED=$(SEED) $(PYTEST) -m '' --hypothesis-seed=$(SEED) $(ARGS)

clean:  ## remove .venv, data and caches; keep work_dirs and the compiled mmcv
	rm -rf $(VENV) data build *.egg-info .pytest_cache .ruff_cache .hypothesis .dist_test
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): tools/bootstrap.py requirements/stack.txt pyproject.toml mmema/update/native.cpp mmema/update/native.py
	$(PYTHON) tools/bootstrap.py $(VENV)
	@touch $@
