"""A tool as one rank of a job on the CPU: ``tool_rank.py TOOL ARGUMENTS``."""

import atexit
import runpy
import sys
from pathlib import Path

import forks
import torch

forks.join_ranks()
atexit.register(lambda: print(f'process group at exit: {torch.distributed.is_initialized()}'))
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name='__main__')
