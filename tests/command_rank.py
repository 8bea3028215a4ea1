"""``mmema COMMAND`` as one rank of a job on the CPU."""

import atexit

import forks
import torch

from mmema.cli.main import main

forks.join_ranks()
atexit.register(lambda: print(f'process group at exit: {torch.distributed.is_initialized()}'))
main()
