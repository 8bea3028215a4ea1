"""Train a toy by DeepSpeed's ZeRO: ``zero_line.py FOLDER CASE ...``, on each of two ranks.

The cases and their results are like those of ``shard_line.py``.
"""

import sys
from functools import partial
from pathlib import Path

import deepspeed
import mmengine._strategy.deepspeed
import runs
import shard_line
import torch
from mmengine import ConfigDict
from mmengine.hooks import Hook
from runs import loader
from shard_line import BEST, DDP, OURS, Line, ShardModel, resumed, runner_of, train

from mmema.run import ema_hook_of, facts_of

# It would be compiled, for minutes.
deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False
# MMEngine 0.10.7 registers DeepSpeed's optimizers for each strategy, an error from the second on.
mmengine._strategy.deepspeed.register_deepspeed_optimizers = list

STRATEGIES = {
    'zero_1': dict(zero_optimization=dict(stage=1)),
    'zero_2': dict(zero_optimization=dict(stage=2)),
    'bf16_1': dict(zero_optimization=dict(stage=1), bf16=dict(enabled=True)),
    'bf16_2': dict(zero_optimization=dict(stage=2), bf16=dict(enabled=True)),
}
TEST = dict(
    test_dataloader={**loader(6, False), 'dataset': Line(24)},
    test_cfg=dict(),
    test_evaluator=dict(type='Score'),
)


def zero(name='zero_1', lr=0.01, **arguments):
    """Return the settings of a run with a strategy of DeepSpeed."""
    strategy = ConfigDict(  # as of a file
        type='mmema.DeepSpeedStrategy',
        train_micro_batch_size_per_gpu=6,
        inputs_to_half=['x', 'y'],
        **{**STRATEGIES[name], **arguments},
    )
    optimizer = dict(type='AdamW', lr=lr)
    wrapper = dict(type='DeepSpeedOptimWrapper', optimizer=optimizer)
    return dict(strategy=strategy, optim_wrapper=wrapper, split=True)


def whole(name, folder):
    train(folder, **zero(name))


def rest(name, folder):
    resumed(folder, name=name, **zero(name)).train()


def ddp(folder):
    train(folder, strategy=dict(DDP), split=True)


def seldom(folder):
    """Validate at the end alone: no swap before."""
    train(folder, val_interval=4, **zero())


class SavedInside(Hook):
    """Saves while the model has the averaged weights."""

    priority = 'LOWEST'

    def before_val_epoch(self, runner):
        if runner.epoch == 2:
            runner.save_checkpoint(f'{runner.work_dir}/inside', 'epoch_2.pth', by_epoch=True)


def inside(folder):
    train(folder, SavedInside(), **zero())


def from_inside(folder):
    resumed(folder, name='inside/inside', **zero()).train()


def loaded(folder):
    """Load bare weights that a learning rate of 0 keeps."""
    bare = folder.parent / 'bare.pth'
    torch.manual_seed(3)
    weights = {name: value + 1 for name, value in ShardModel().state_dict().items()}
    if torch.distributed.get_rank() == 0:
        torch.save(weights, bare)
    torch.distributed.barrier()
    train(folder, load_from=str(bare), epochs=1, **zero(lr=0.0))


def accumulated(folder):
    """Make a step in every second of 7 iterations; the last is of none."""
    settings = dict(ema=dict(OURS, also=None), iters=7, param_scheduler=None)
    runner = runner_of(folder, **settings, **zero(gradient_accumulation_steps=2))
    runner.train()
    hook = ema_hook_of(runner)
    return int(hook.ema_model.steps), facts_of(runner, hook)


def tested(folder):
    file = f'{folder.parent}/zero_1/epoch_4.pth'
    return runner_of(folder, load_from=file, **TEST, **zero()).test()


def tested_by_ddp(folder):
    """Test the weights in the file that the folder has."""
    file = f'{folder.parent}/zero_1/epoch_4.pth/mp_rank_00_model_states.pt'
    return runner_of(folder, load_from=file, strategy=dict(DDP), **TEST).test()


# --- refusals -------------------------------------------------------------------------------------


def stage_0(folder):
    train(folder, **zero(zero_optimization=dict()))


def stage_3(folder):
    train(folder, **zero(zero_optimization=dict(stage=3)))


def stock_strategy(folder):
    settings = zero()
    settings['strategy']['type'] = 'mmengine.DeepSpeedStrategy'
    train(folder, **settings)


def stock_hook(folder):
    train(folder, ema=runs.EMA, val_cfg={}, **zero())


def from_best(folder):
    train(folder, dict(BEST), **zero())


def recalibrate(folder):
    train(folder, dict(type='mmema.EMARecalibrateHook'), **zero())


def from_file(folder):
    resumed(folder, name='ddp', **zero()).train()


CASES = {
    **{name: value for name, value in globals().items() if callable(value)},
    **{name: partial(whole, name) for name in STRATEGIES},
    **{f'rest_{name}': partial(rest, name) for name in STRATEGIES},
}

if __name__ == '__main__':
    shard_line.main(Path(sys.argv[1]), sys.argv[2:], CASES)
