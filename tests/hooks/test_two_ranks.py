"""Two processes on the CPU: every rank ends with the same numbers, and with those of all data."""

import forks
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import MMDistributedDataParallel
from runs import Line, NormModel, ema, loader, plain_runner

from mmema.run import ema_hook_of

HOOKS = [dict(type='mmema.EMARecalibrateHook'), dict(type='mmema.EMAMonitorHook')]


class Odd(NormModel):
    """A second norm that sees the data of rank 1 alone."""

    def forward(self, x, y=None, mode='tensor'):
        if torch.distributed.get_rank():
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


def rank_of_two():
    torch.set_num_threads(1)
    forks.join_ranks()
    keep = Keep()
    plain_runner(
        'run',
        [ema(), keep, *HOOKS],
        epochs=1,
        model=MMDistributedDataParallel(Odd(), find_unused_parameters=True),
        train_dataloader=loader(4, length=8, shuffle=False),
        val_cfg=dict(type='mmema.EMAValLoop'),
        launcher='pytorch',
    ).train()
    torch.save(keep.kept, f'kept_{torch.distributed.get_rank()}.pth')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_both_ranks_agree(tmp_path):
    ranks = forks.start_ranks(2, __file__, folder=tmp_path)
    status = [rank.wait() for rank in ranks]
    assert status == [0, 0], (tmp_path / 'rank_0.txt').read_text()[-3000:]
    first, second = (torch.load(tmp_path / f'kept_{r}.pth', weights_only=False) for r in (0, 1))
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
    assert list(metrics) == ['toy/mean', 'toy/worst', 'raw/toy/mean', 'raw/toy/worst']
    # Rank 0 has samples 0, 2, 4, 6 and rank 1 the others, one batch each.
    weight, bias = average['linear.weight'], average['linear.bias']
    outs = [Line(8).x[rank::2] @ weight.T + bias for rank in (0, 1)]
    mean = (outs[0].mean(0) + outs[1].mean(0)) / 2
    variance = (outs[0].var(0) + outs[1].var(0)) / 2
    torch.testing.assert_close(average['norm.running_mean'], mean)
    torch.testing.assert_close(average['norm.running_var'], variance)
    assert not torch.allclose(source['norm.running_mean'], mean)
    assert torch.equal(average['unused.running_mean'], torch.zeros(3))
    assert other['unused.running_mean'].any()


if __name__ == '__main__':
    rank_of_two()
