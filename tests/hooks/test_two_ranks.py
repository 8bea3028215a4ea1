"""Two processes on the CPU: every rank ends with the same numbers, and with those of all data."""

import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from toy_runs import Model, ema, loader, make_runner

from mmema.run import ema_hook_of

HOOKS = [dict(type='mmema.EMARecalibrateHook'), dict(type='mmema.EMAMonitorHook')]


class Odd(Model):
    """A second norm that sees odd samples alone: those of rank 1."""

    def forward(self, x, y, mode='tensor'):
        if x[0, 0] % 2:
            self.unused(x)
        return super().forward(x, y, mode)


class Keep(Hook):
    priority = 'LOWEST'

    def __init__(self):
        self.kept = []

    def after_val_epoch(self, runner, metrics=None):
        average = ema_hook_of(runner).ema_model.module
        state = {key: value.clone() for key, value in average.state_dict().items()}
        own = {key: value.clone() for key, value in runner.model.module.state_dict().items()}
        self.kept.append((state, own, dict(metrics)))


def rank_of_two(rank, port, folder):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
    )
    # MMEngine's launcher would ask for a GPU; with a group that is there it goes on.
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    keep = Keep()
    make_runner(
        Path(folder),
        [ema(), keep, *HOOKS],
        epochs=1,
        model=MMDistributedDataParallel(Odd(), find_unused_parameters=True),
        train_dataloader=loader(),
        val_cfg=dict(type='mmema.EMAValLoop'),
        launcher='pytorch',
    ).train()
    torch.save(keep.kept, f'{folder}/rank{rank}.pth')


@pytest.mark.slow
def test_both_ranks_agree(tmp_path):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_of_two, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f'rank{r}.pth', weights_only=False) for r in (0, 1))
    (average, source, metrics), (other, other_source, other_metrics) = first[0], second[0]
    for key, value in average.items():
        if key == 'passes':
            continue
        if key.startswith('unused.running') or key == 'unused.num_batches_tracked':
            # What one rank could not measure stays as it was in both: each has its own.
            assert torch.equal(value, source[key]), key
            assert torch.equal(other[key], other_source[key]), key
        else:
            assert torch.equal(value, other[key]), key
    # MMEngine's broadcast of results from rank 0 makes them equal in all ranks.
    assert metrics == other_metrics
    assert list(metrics) == ['toy/mean', 'toy/accuracy', 'raw/toy/mean', 'raw/toy/accuracy']
    # Rank 0 has samples 0, 2, 4, 6 and rank 1 the others, one batch each.
    weight, bias = average['linear.weight'], average['linear.bias']
    outs = [
        torch.tensor([[float(i), float(i % 3)] for i in range(rank, 8, 2)]) @ weight.T + bias
        for rank in (0, 1)
    ]
    mean = (outs[0].mean(0) + outs[1].mean(0)) / 2
    variance = (outs[0].var(0) + outs[1].var(0)) / 2
    torch.testing.assert_close(average['norm.running_mean'], mean)
    torch.testing.assert_close(average['norm.running_var'], variance)
    assert not torch.allclose(source['norm.running_mean'], mean)
    assert torch.equal(average['unused.running_mean'], torch.zeros(2))
    assert other['unused.running_mean'].any()
