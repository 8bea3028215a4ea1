"""Train the toy of runs.py in every way that wraps a model: ``sharded_line.py FOLDER``.

Started once on each of two ranks, as a start takes seconds. Each case is a function; rank 0 writes
its tensors after training to ``FOLDER/CASE.pth``, or the text of its error to ``CASE.txt``.
"""

import sys
import traceback
from pathlib import Path

import forks
import runs
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.runner import FlexibleRunner, Runner
from runs import EMA, LineModel, state_of

from mmema.messages import RunError
from mmema.run import averages_of, ema_hook_of

ALSO = dict(
    short=dict(restart=dict(milestones=[2], gamma=3)),
    plateau=dict(restart=dict(on_plateau=dict(metric='score', rule='less'))),
    recent=dict(horizon='2 epochs'),
)
# With batches of 6 on each rank k is 2.
OURS = dict(EMA, type='mmema.EMAHook', base_batch_size=6, also=ALSO)
VAL = dict(type='mmema.EMAValLoop')
# MMEngine passes LOCAL_RANK as the device, which would be a GPU.
DDP = dict(
    type='DDPStrategy',
    model_wrapper=dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False),
)
FSDP = dict(type='MMFullyShardedDataParallel', device_id=torch.device('cpu'))


def train(runner_class, folder, epochs=4, **settings):
    """Train in ``folder`` and return the tensors of the run."""
    settings = {'ema': OURS, 'model': LineModel(), 'launcher': 'pytorch', **settings}
    settings['val_cfg'] = VAL if settings['ema'] is OURS else {}
    runs.Runner = runner_class
    runner = runs.make_runner(folder, epochs=epochs, **settings)
    runner.train()
    runner.model = getattr(runner.model, 'module', runner.model)
    state = state_of(runner)
    for name, ema in averages_of(ema_hook_of(runner)).items():
        state.update({f'{name}.{key}': t.clone() for key, t in ema.state_dict().items()})
    return state


def ddp_runner(folder):
    """MMEngine's Runner: the run that DDPStrategy has to repeat bit by bit."""
    return train(Runner, folder, model=MMDistributedDataParallel(LineModel()))


def ddp_strategy(folder):
    """FlexibleRunner trains and saves."""
    return train(FlexibleRunner, folder, strategy=dict(DDP))


def ddp_strategy_resumed(folder):
    """FlexibleRunner resumes its own checkpoint after two of four epochs."""
    file = str(folder.parent / 'ddp_strategy/epoch_2.pth')
    return train(FlexibleRunner, folder, strategy=dict(DDP), load_from=file, resume=True)


def fsdp1_runner(folder):
    """MMEngine's Runner with FSDP1."""
    return train(Runner, folder, cfg=dict(model_wrapper_cfg=FSDP))


def fsdp1_strategy(folder):
    """FlexibleRunner with FSDP1."""
    return train(FlexibleRunner, folder, strategy=dict(type='FSDPStrategy', model_wrapper=FSDP))


def fsdp1_stock_hook(folder):
    """MMEngine's EMAHook with one of our averages and FSDP1."""
    return train(Runner, folder, ema=EMA, cfg=dict(model_wrapper_cfg=FSDP))


CASES = [ddp_runner, ddp_strategy, ddp_strategy_resumed, fsdp1_runner, fsdp1_strategy]
CASES += [fsdp1_stock_hook]


def main(folder):
    torch.set_num_threads(1)
    forks.join_ranks()
    is_first = torch.distributed.get_rank() == 0
    for case in CASES:
        try:
            state = case(folder / case.__name__)
            if is_first:
                torch.save(state, folder / f'{case.__name__}.pth')
        except Exception as error:
            if is_first:
                text = str(error) if isinstance(error, RunError) else traceback.format_exc()
                (folder / f'{case.__name__}.txt').write_text(text)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(Path(sys.argv[1]))
