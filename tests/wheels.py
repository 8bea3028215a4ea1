"""The wheel of this checkout, built from a copy of it and installed beside it."""

import os
import shutil
import subprocess
import sys

import forks
from tool_runs import ROOT

PIP_INSTALL = ('-m', 'pip', 'install', '--no-deps', '--no-build-isolation')


def copy_sources(folder):
    """Copy what the package is built from: a build writes beside its sources."""
    for name in ('mmema', 'configs', 'tools'):
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for file in ROOT.iterdir():
        if file.is_file() and file.suffix in ('.toml', '.py', '.in', '.md', '.cff', ''):
            shutil.copy(file, folder)
    return folder


def call(*command, folder, **environment):
    """Run a command that succeeds; return what it printed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=forks.LIMIT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def python(*arguments, folder, **environment):
    """Run Python in a new process; return what it printed."""
    return call(sys.executable, '-W', 'ignore', *arguments, folder=folder, **environment)
