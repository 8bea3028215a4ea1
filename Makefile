# `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
DIGITS := data/digits
CONFIG := configs/digits/yolov5_n_digits.py
WORK_DIR := work_dirs/digits
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup train test quick clean

help:  ## print this list
	@echo 'usage: make TARGET'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make .venv with torch, mmcv, mmdet, mmyolo and mmema (minutes, once)

train: $(READY)  ## train YOLOv5-n with a restartable EMA on digits (to go on: make train ARGS=--resume)
	$(RUN) tools/make_digits.py $(DIGITS)
	$(RUN) tools/train.py $(CONFIG) --work-dir $(WORK_DIR) $(ARGS)

test: $(READY)  ## check the style and run every test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pytest $(ARGS)

quick: $(READY)  ## run the fast tests, for after each edit
	$(RUN) -m pytest -m 'not slow' -q $(ARGS)

clean:  ## remove .venv, data and caches; keep work_dirs and the compiled mmcv
	rm -rf $(VENV) data build *.egg-info .pytest_cache .ruff_cache .hypothesis .dist_test
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): tools/bootstrap.py requirements/stack.txt pyproject.toml mmema/update/native.cpp mmema/update/native.py
	$(PYTHON) tools/bootstrap.py $(VENV)
	@touch $@
