"""The core tests on the maintained fork of MMEngine, which `make setup` puts into a folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import forks
import pytest
from tool_runs import ROOT

pytestmark = pytest.mark.slow
FORK = Path(sys.prefix) / 'onedl-mmengine'  # as in tools/bootstrap.py
# Where the fork differs: reading checkpoints, resuming, samplers, the hooks that save.
CORE = [
    'checkpoints/test_torch_load.py',
    'checkpoints/test_resume.py',
    'hooks/test_ema.py',
    'hooks/test_restart.py',
    'upstream/test_mmengine.py',
]


@pytest.mark.skipif(not FORK.is_dir(), reason='no onedl-mmengine; `make setup` installs it')
def test_the_core_tests_pass_on_the_maintained_fork(tmp_path):
    files = [f'tests/{name}' for name in CORE]
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-m']
        + ['not slow and not extensive', f'--basetemp={tmp_path}/of_the_tests', *files],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(FORK), 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=forks.LIMIT,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert f'MMEngine of {FORK}' in done.stdout
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) > 200
