"""Train a toy in one process or sharded: ``shard_line.py FOLDER CASE ...``, on each rank.

Several cases share a start, as that takes seconds. Each is a function, for which rank 0 writes what
it returns to ``FOLDER/CASE.pth``, or the text of its error to ``CASE.txt``.
"""

import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import forks
import runs
import torch
from mmengine.hooks import Hook
from mmengine.runner import FlexibleRunner, Runner
from runs import Line, LineModel, loader
from torch import nn

from mmema.messages import RunError
from mmema.run import ema_hook_of
from mmema.update import sharded as shards

WORLD = int(os.environ['WORLD_SIZE'])
SHARD = ['layers.*', 'two', 'tied']
ALSO = dict(
    short=dict(restart=dict(milestones=[2], gamma=3)),
    plateau=dict(restart=dict(on_plateau=dict(metric='score', rule='less'))),
)
OURS = dict(type='mmema.EMAHook', momentum=0.1, gamma=5, exclude=['two.*'], also=ALSO)
BEST = dict(type='mmema.EMARestartHook', milestones=[2, 3], source='best', momentum=0.2)
DDP = dict(
    type='DDPStrategy',
    model_wrapper=dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=True,
    ),
)
SGD = dict(optimizer=dict(type='SGD', lr=0.05, momentum=0.9))


class Alike(Line):
    """The points of a line so that each rank gets what one process alone would get."""

    def __len__(self):
        return super().__len__() * WORLD

    def __getitem__(self, index):
        return super().__getitem__(index // WORLD)


class Twice(nn.Module):
    """Two layers that are one, as in the heads of RTMDet."""

    def __init__(self, layer):
        super().__init__()
        self.first = self.second = layer

    def forward(self, x):
        return self.second(self.first(x))


class ShardModel(LineModel):
    """Uneven parts, a tied layer, frozen parameters, and buffers of each kind."""

    def __init__(self):
        super().__init__()
        self.two = nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5), nn.Linear(5, 3))
        self.tied = Twice(nn.Linear(3, 3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer('cache', torch.rand(3), persistent=False)

    def forward(self, x, y=None, mode='tensor'):
        if self.training:
            self.cache = self.cache + 1
        return super().forward(self.tied(self.two(x)) * self.frozen, y, mode)


class AtIteration(Hook):
    """Calls a function with the runner after an iteration."""

    def __init__(self, iteration, function):
        self.iteration = iteration
        self.function = function

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == self.iteration:
            self.function(runner)


def runner_of(folder, *hooks, strategy=None, epochs=4, split=False, **settings):
    """Return a FlexibleRunner; ``split`` gives other data to each rank."""
    data = loader(6, False)
    data['dataset'] = Line(24) if split else Alike(24)
    settings = {
        'ema': OURS,
        'model': ShardModel(),
        'optim_wrapper': dict(optimizer=dict(type='AdamW', lr=0.01)),
        'param_scheduler': dict(type='ExponentialLR', gamma=0.95, by_epoch=True, end=100),
        'val_cfg': dict(type='mmema.EMAValLoop'),
        'launcher': 'none' if strategy is None else 'pytorch',
        'data': data,
        **settings,
    }
    strategy = strategy or dict(type='SingleDeviceStrategy')
    monitor = dict(type='mmema.EMAMonitorHook', interval=1, check_ranks=2)
    return runs.make_runner(folder, monitor, *hooks, strategy=strategy, epochs=epochs, **settings)


def train(*args, **settings):
    runner = runner_of(*args, **settings)
    runner.train()
    scalars = runner.message_hub.log_scalars
    return {k: v.data[0].tolist() for k, v in scalars.items() if 'time' not in k}


def fully_shard(**arguments):
    if os.environ.get('ALONE'):  # the same cases in one process, for the others to repeat
        return None
    return dict(type='mmema.FullyShardStrategy', **{'shard': SHARD, **arguments})


# --- the same in one process and on several ranks -------------------------------------------------


def adam(folder):
    return train(folder, strategy=fully_shard())


def sgd(folder):
    """Blended buffers, a guard, restarts by a hook from the average, and by hand."""
    ema = dict(OURS, update_buffers=True, skip_non_finite=True)
    hooks = [
        dict(type='mmema.EMARestartHook', milestones=[2], source='ema', steps=2, momentum=0.2),
        AtIteration(5, lambda runner: ema_hook_of(runner).ema_model.restart(steps=0, gamma=2)),
    ]
    return train(folder, *hooks, ema=ema, optim_wrapper=dict(SGD), strategy=fully_shard())


def best(folder):
    """Return to the best checkpoint at a restart."""
    return train(folder, dict(BEST), strategy=fully_shard())


def ladder(folder):
    """A ladder of averages with a restart, and blends at every second update or fewer."""
    ema = dict(type='mmema.EMAHook', horizon=[0.2, 0.4, 0.8], also=ALSO, interval=2)
    hook = dict(type='mmema.EMARestartHook', milestones=[2])
    return train(folder, hook, ema=ema, strategy=fully_shard())


def loaded(folder):
    """Begin from bare weights, which have a layer of another shape."""
    weights = ShardModel().state_dict()
    weights = {name: value + 1 for name, value in weights.items()}
    weights['layers.2.weight'] = torch.ones(2, 2)
    bare = f'{folder}.{os.environ["RANK"]}.bare'
    # MMEngine's own strategies do not read bare weights.
    weights = dict(state_dict=weights) if os.environ.get('ALONE') else weights
    torch.save(weights, bare, _use_new_zipfile_serialization=False)
    return train(folder, strategy=fully_shard(), epochs=1, load_from=bare)


def tested(folder):
    """Test the averaged weights in a checkpoint; every rank gives its metrics."""
    test = dict(
        test_dataloader=loader(6, False), test_cfg=dict(), test_evaluator=dict(type='Score')
    )
    test['test_dataloader']['dataset'] = Alike(24)
    file = str(folder.parent / 'adam/epoch_4.pth')
    return runner_of(folder, strategy=fully_shard(), load_from=file, **test).test()


# --- one process goes on where ranks stopped, and the other way round -----------------------------


def resumed(folder, *hooks, name='adam', epoch=2, **settings):
    file = str(folder.parent / name / f'epoch_{epoch}.pth')
    return runner_of(folder, *hooks, load_from=file, resume=True, **settings)


def from_alone(folder):
    resumed(folder, strategy=fully_shard(), name='../1/adam').train()


def from_ranks(folder):
    resumed(folder, strategy=fully_shard()).train()


def on_three(folder):
    """Resume on three ranks, from a file and from a folder, and save what has come."""
    for name, hooks in (('../2/adam', []), ('../2/folders', [dict(BEST)])):
        runner = resumed(folder, *hooks, strategy=fully_shard(), epochs=2, name=name)
        runner.train()
        runner.model.eval()  # else one more epoch counts as done
        runner.save_checkpoint(str(folder), f'{Path(name).name}.pth', by_epoch=True)


# --- two ranks ------------------------------------------------------------------------------------


def replicas(folder):
    train(folder, strategy=fully_shard(replicas=2), epochs=2)


def offload(folder):
    train(folder, strategy=fully_shard(cpu_offload=True), epochs=2)


def folders(folder):
    """Save in folders; go on from one."""
    hook, strategy = dict(BEST), fully_shard(sharded_checkpoint=True)
    train(folder, hook, strategy=strategy)
    again = folder.with_name('folders_resumed')
    if os.environ['RANK'] == '0':
        shutil.copytree(folder, again)
    torch.distributed.barrier()
    resumed(again, dict(BEST), strategy=dict(strategy), name='folders_resumed').train()


def ddp(folder):
    """Other data on each rank."""
    train(folder, strategy=dict(DDP), split=True, epochs=2)


def split(folder):
    train(folder, strategy=fully_shard(), split=True, epochs=2)


def drift(folder, strategy=None):
    """One rank changes its average."""

    def change(runner):
        if runner.rank:
            with torch.no_grad():
                ema_hook_of(runner).also['short'].module.layers._modules['0'].weight.add_(1)

    train(folder, AtIteration(2, change), strategy=strategy or dict(DDP), epochs=2)


def drift_of_replicas(folder):
    drift(folder, fully_shard(replicas=2))


def bfloat16(folder):
    """Compute in bf16; parts and average stay float32."""
    policy = dict(param_dtype='bfloat16', reduce_dtype='float32')
    runner = runner_of(folder, strategy=fully_shard(mixed_precision=policy), epochs=2)
    runner.train()
    model, average = runner.model, ema_hook_of(runner).ema_model.module
    return {str(tensor.dtype) for m in (model, average) for tensor in m.parameters()}


def without_reshard(folder):
    """The mutation: written into the parts while the root is gathered."""
    own, shards.reshard = shards.reshard, lambda modules: None
    try:
        train(folder, strategy=fully_shard(), epochs=2)
    finally:
        shards.reshard = own


def without_shape(folder):
    """The mutation: parts of the average that are taken for equally large."""
    from torch.distributed.tensor import DTensor

    def whole(self, part):
        return DTensor.from_local(part, self.mesh, self.placements, run_check=False)

    own, shards.Layout.whole = shards.Layout.whole, whole
    try:
        train(folder, strategy=fully_shard(), epochs=1)
    finally:
        shards.Layout.whole = own


# --- a rank that is killed while it saves ---------------------------------------------------------


class Deadly:
    """Kills the process that pickles it."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


class KilledAtSave(Hook):
    """Kills a rank in the third epoch: the first while it writes, the other one before it."""

    priority = 'LOWEST'

    def __init__(self, rank):
        self.rank = rank

    def before_save_checkpoint(self, runner, checkpoint):
        if runner.iter >= 12 and runner.rank == self.rank:
            if self.rank:
                os.kill(os.getpid(), signal.SIGKILL)
            checkpoint['killed'] = Deadly()


def killed_0(folder):
    train(folder, KilledAtSave(0), strategy=fully_shard())


def killed_1(folder):
    train(folder, KilledAtSave(1), strategy=fully_shard())


def killed_1_in_folders(folder):
    train(folder, KilledAtSave(1), strategy=fully_shard(sharded_checkpoint=True))


def after_kill(folder):
    """Go on after a kill, as MMEngine finds the last checkpoint."""
    folder = next(folder.parent.glob('killed_*'))
    runner_of(folder, strategy=fully_shard(), resume=True).train()


# --- refusals -------------------------------------------------------------------------------------


def plain_runner(folder):
    from torch.distributed.fsdp import fully_shard

    model = LineModel()
    fully_shard(model, mesh=torch.distributed.init_device_mesh('cpu', (WORLD,)))
    runs.Runner = Runner
    runs.make_runner(folder, ema=OURS, model=model).train()


def stock_hook(folder):
    """MMEngine's own EMAHook with one of our averages."""
    train(folder, strategy=fully_shard(), ema=runs.EMA, val_cfg={})


def recalibrate(folder):
    hook = dict(type='mmema.EMARecalibrateHook')
    train(folder, hook, strategy=fully_shard())


def wrong_pattern(folder):
    train(folder, strategy=fully_shard(shard=['layer.*']))


def wrong_replicas(folder):
    train(folder, strategy=fully_shard(replicas=3))


def tied_apart(folder):
    """A parameter in two groups."""
    model = ShardModel()
    model.layers[2].bias = nn.Parameter(torch.ones(3))
    model.layers[2].weight = nn.Parameter(torch.ones(3, 4))
    model.tied.first.bias = model.layers[2].bias
    train(folder, model=model, strategy=fully_shard())


CASES = {name: value for name, value in globals().items() if callable(value)}


def main(folder, names, cases=CASES):
    torch.set_num_threads(1)
    alone = bool(os.environ.get('ALONE'))
    if not alone:
        forks.join_ranks()
    for name in names:
        runs.Runner = FlexibleRunner
        try:
            result, kind = cases[name](folder / name), 'pth'
        except Exception as error:
            kind = 'txt'
            result = str(error) if isinstance(error, RunError) else traceback.format_exc()
        if os.environ['RANK'] == '0':
            if kind == 'pth':
                torch.save(result, folder / f'{name}.pth')
            else:
                (folder / f'{name}.txt').write_text(result)
        if not alone:
            torch.distributed.barrier()
    if not alone:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(Path(sys.argv[1]), sys.argv[2:])
