"""Calls of the command-line tools: in this process, in a fork, and as a person makes them."""

import importlib.util
import io
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import forks
import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'digits' / 'yolov5_n_digits.py'
sys.path.insert(0, str(ROOT / 'tools'))


@lru_cache(None)
def tool(name):
    """Import ``tools/<name>``; as `test` it would be Python's own package."""
    spec = importlib.util.spec_from_file_location(f'tool_{name[:-3]}', ROOT / 'tools' / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusal(name, *arguments, folder):
    """Return the line with which a tool refuses a call; fail if it does anything else."""
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit) as end:
        call_here(name, *arguments, folder=folder)
    assert end.value.code == 2
    last = errors.getvalue().rstrip().splitlines()[-1]
    assert last.startswith(f'{name}: ')
    return last


def call_here(name, *arguments, folder):
    """Run ``tools/<name>`` in this process."""
    argv = patch.object(sys, 'argv', [name, *map(str, arguments)])
    with chdir(folder), patch.dict(os.environ), argv:
        tool(name).main()


def call_tool(name, *arguments, folder):
    """Run ``tools/<name>`` in a fork; return the finished process with its output as text."""
    with TemporaryDirectory() as streams:
        out, errors = Path(streams, 'out'), Path(streams, 'err')
        process = forks.start(ROOT / 'tools' / name, *arguments, folder=folder, out=out, err=errors)
        status = process.wait()
        return subprocess.CompletedProcess(name, status, out.read_text(), errors.read_text())


def real_call(name, *arguments, folder):
    """Run ``tools/<name>`` in a new Python, imports and all."""
    return subprocess.run(
        [sys.executable, ROOT / 'tools' / name, *map(str, arguments)],
        cwd=folder,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=forks.LIMIT,
    )
