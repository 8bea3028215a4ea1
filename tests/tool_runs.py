"""Calls of the real command-line tools, as a person makes them: another process, any folder."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'digits' / 'yolov5_n_digits.py'


def call_tool(name, *arguments, folder):
    """Run ``tools/<name>`` in a folder; return the finished process with its output as text."""
    return subprocess.run(
        [sys.executable, ROOT / 'tools' / name, *map(str, arguments)],
        cwd=folder,
        env=dict(os.environ, OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        timeout=400,
    )


def refusal(name, *arguments, folder):
    """Return the line with which a tool refuses a call; fail if it does anything else."""
    done = call_tool(name, *arguments, folder=folder)
    assert done.returncode == 2, done.stderr[-2000:]
    assert 'Traceback' not in done.stdout + done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith(f'{name}: ')
    return last
