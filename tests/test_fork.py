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
# Where the fork differs: reading checkpoints, resuming, samplers that skip.
FILES = [
    'tests/checkpoints/test_torch_load.py',
    'tests/checkpoints/test_resume.py',
    'tests/hooks/test_ema.py',
    'tests/hooks/test_restart.py',
]
SOME = ['-m', 'not slow and not extensive', '-k', 'torch_load or resum or infinite_sampler']


@pytest.mark.skipif(not FORK.is_dir(), reason='no onedl-mmengine; `make setup` installs it')
def test_the_core_tests_pass_on_the_maintained_fork(tmp_path):
    options = ['-p', 'no:cacheprovider', '-p', 'no:xdist', '--basetemp', tmp_path / 'its_tests']
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', *options, *SOME, *FILES],
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(FORK), 'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=forks.LIMIT,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert f'MMEngine of {FORK}' in done.stdout
    assert int(re.search(r'(\d+) passed', done.stdout)[1]) > 40
