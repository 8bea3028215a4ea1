"""Processes forked from a parent that has imported the stack, so that each starts in milliseconds.

A fork is a process of its own in all else: it has its arguments, folder, environment and output,
runs a script from its first line to the orderly end of Python, and can be killed. It imports from
where its parent does, and from this folder.
"""

import atexit
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from datetime import timedelta
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

PRELOADED = [
    'matplotlib.pyplot',
    'mmengine.runner',
    'mmengine.visualization',
    *(f'mmdet.{part}' for part in ('datasets', 'engine', 'evaluation', 'models', 'visualization')),
    *(f'mmyolo.{part}' for part in ('datasets', 'engine', 'models')),
]  # not mmema: what importing it does is tested
TESTS = str(Path(__file__).parent)
LIMIT = 400  # seconds after which a process ends by itself: a hang, not a slow machine


class Process:
    """A running fork, with the interface of `subprocess.Popen`."""

    def __init__(self, pid):
        self.pid = pid
        self.returncode = None

    def poll(self):
        if self.returncode is None:
            self.returncode = ask(wait=self.pid)
        return self.returncode

    def wait(self):
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def kill(self):
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def start(script, *arguments, folder, out, err=None, **environment):
    """Start a script of Python; its output goes to the file ``out``, errors to ``err`` if given."""
    pid = ask(
        argv=list(map(str, [script, *arguments])),
        folder=str(folder),
        out=str(out),
        err=str(err or out),
        environment={**os.environ, 'PYTHONPATH': with_tests_on_path(), **environment},
    )
    return Process(pid)


def with_tests_on_path():
    """Return PYTHONPATH with this folder in it: scripts of the tests import from here."""
    return os.pathsep.join(filter(None, [os.environ.get('PYTHONPATH'), TESTS]))


def start_ranks(count, script, *arguments, folder, **environment):
    """Start the ranks of a distributed job; rank N writes its output to ``rank_N.txt``."""
    return [
        start(
            script,
            *arguments,
            folder=folder,
            out=Path(folder, f'rank_{rank}.txt'),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            **environment,
        )
        for rank in range(count)
    ]


def join_ranks():
    """Make the process group of a rank on the CPU; MMEngine's launcher would ask for a GPU."""
    import torch

    torchrun = 'MASTER_PORT' in os.environ
    torch.distributed.init_process_group(
        'gloo',
        init_method='env://' if torchrun else f'file://{Path.cwd()}/group',
        rank=int(os.environ['RANK']),
        world_size=int(os.environ['WORLD_SIZE']),
        timeout=timedelta(seconds=60),
    )


def ask(**request):
    """Send a request to the parent of all forks, which is started by the first one."""
    if not _parent:
        parent = subprocess.Popen(
            [sys.executable, '-W', 'ignore', __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'Agg'},
        )
        atexit.register(parent.communicate)
        _parent.append(parent)
    print(json.dumps(request), file=_parent[0].stdin, flush=True)
    answer = _parent[0].stdout.readline()
    assert answer, 'the parent of all forks has ended, its standard error says why'
    return json.loads(answer)


_parent = []


# --- in the parent of all forks ----------------------------------------------------------------


def serve():
    """Answer requests; return in each fork, with its request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest
    for line in sys.stdin:
        request = json.loads(line)
        if 'wait' in request:
            pid, status = os.waitpid(request['wait'], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                return request
        print(json.dumps(answer), flush=True)
    os._exit(0)  # forks that still run are not waited for


def become(request):
    """Give this fork what a new process would have."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.alarm(LIMIT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, request['out']), (2, request['err'])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.environ.clear()
    os.environ.update(request['environment'])
    os.chdir(request['folder'])
    sys.argv = request['argv']
    import numpy

    numpy.random.seed(random.SystemRandom().randrange(2**32))


if __name__ == '__main__':
    import runpy

    with redirect_stdout(sys.stderr):  # deepspeed, which MMEngine imports, greets
        for module in PRELOADED:
            if find_spec(module.partition('.')[0]):  # `make stacks` has some without these
                import_module(module)
        import mmengine.runner.runner as runner  # which asks the compilers for each Runner

        runner.collect_env = lru_cache(None)(runner.collect_env)
        runner.collect_env()
    assert len(os.listdir('/proc/self/task')) == 1, 'a process with threads must not fork'
    gc.freeze()  # a fork then ends in 0.3 seconds instead of 1.2
    become(serve())
    runpy.run_path(sys.argv[0], run_name='__main__')
