"""Calls of the commands: in this process, in a fork, and as a person makes them."""

import io
import os
import subprocess
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import forks
import pytest

from mmema.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'digits' / 'yolov5_n_digits.py'


def refusal(command, *arguments, folder):
    """Return the line with which a command refuses a call; fail if it does anything else."""
    errors = io.StringIO()
    with redirect_stderr(errors), pytest.raises(SystemExit) as end:
        call_here(command, *arguments, folder=folder)
    assert end.value.code == 2
    last = errors.getvalue().rstrip().splitlines()[-1]
    assert last.startswith('mmema')
    return last


def call_here(command, *arguments, folder):
    """Run ``mmema COMMAND`` in this process."""
    with chdir(folder), patch.dict(os.environ):
        main([command, *map(str, arguments)])


def output_of(command, *arguments, folder):
    """Run ``mmema COMMAND`` in this process; return what it printed."""
    with redirect_stdout(io.StringIO()) as printed:
        call_here(command, *arguments, folder=folder)
    return printed.getvalue()


def call_forked(command, *arguments, folder):
    """Run ``mmema COMMAND`` in a fork; return the finished process with its output as text."""
    with TemporaryDirectory() as streams:
        out, errors = Path(streams, 'out'), Path(streams, 'err')
        call = (SCRIPT, command, *arguments)
        status = forks.start(*call, folder=folder, out=out, err=errors).wait()
        return subprocess.CompletedProcess(command, status, out.read_text(), errors.read_text())


SCRIPT = ROOT / 'tests' / 'command.py'


def real_call(*words, folder):
    """Run Python with these words in a new process, imports and all."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=forks.LIMIT,
    )
