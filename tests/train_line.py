"""Train the toy of runs.py in a process of its own: ``train_line.py SETTINGS.json``.

The settings are those of ``make_runner``, with ``hooks`` for its hooks; ``slow`` is how many
seconds an iteration lasts at least, ``die`` the [rank, iteration] at which a rank kills itself, and
with ``only_rank_0_sees`` the metrics of the other ranks are made up. Each iteration adds a byte to
``pace`` in the work folder, and at the end each rank writes its tensors to ``final_RANK.pth``.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import forks
import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS
from runs import LineModel, make_runner, state_of

import mmema  # noqa: F401


class MadeUpMetrics(Hook):
    """Shows other numbers to all ranks but the first, before any other hook sees them."""

    priority = 'HIGHEST'

    def after_val_epoch(self, runner, metrics=None):
        if runner.rank:
            metrics['score'] = -1000.0 - runner.iter * runner.rank


@HOOKS.register_module()
class Pace(Hook):
    """Slows the run down; ``die`` and ``fail`` are the [rank, iteration] at which one rank ends."""

    def __init__(self, slow=0, die=None, fail=None):
        self.slow, self.die, self.fail = slow, die, fail

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        with open(os.path.join(runner.work_dir, 'pace'), 'ab') as file:
            file.write(b'.')
        time.sleep(self.slow)
        if self.die == [runner.rank, runner.iter]:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fail == [runner.rank, runner.iter]:
            raise RuntimeError('on this rank alone')


def main():
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text())
    hooks = [*settings.pop('hooks', []), Pace(settings.pop('slow', 0), settings.pop('die', None))]
    if settings.pop('only_rank_0_sees', False):
        hooks.append(MadeUpMetrics())
    rank = int(os.environ.get('RANK', 0))
    if 'RANK' in os.environ:
        forks.join_ranks()
        settings.update(launcher='pytorch', model=MMDistributedDataParallel(LineModel()))
    runner = make_runner(settings.pop('work_dir'), *hooks, **settings)
    runner.train()
    work_dir = Path(runner.work_dir)
    runner.model = getattr(runner.model, 'module', runner.model)
    torch.save(state_of(runner), work_dir / f'final_{rank}.part')
    os.replace(work_dir / f'final_{rank}.part', work_dir / f'final_{rank}.pth')


if __name__ == '__main__':
    from mmema.cli.common import run

    run(main)
