"""The recipes: what they change in the stock configs, and that their parts build."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS, init_default_scope

from mmema import EMAHook, EMARestartHook, RestartableExpMomentumEMA
from mmema.run import less_is_better, switches_of

mmyolo = pytest.importorskip('mmyolo')
FOLDER = Path(__file__).parents[1] / 'configs' / 'coco'
STOCK = Path(mmyolo.__file__).parent / '.mim' / 'configs'

# Name, epochs, 0-based epoch of the restart.
RECIPES = [
    ('rtmdet_s_restart', 300, 280),
    ('rtmdet_s_dfine_refresh', 300, 280),
    ('yolov8_s_restart', 500, 490),
    ('yolov5_s_restart', 300, 285),
    ('yolox_s_restart', 300, 284),  # its hook switches one epoch earlier than its argument says
]
# Name, and whether the stock recipe has a switch that the ladder leaves there.
LADDERS = [
    ('rtmdet_s_auto', True),
    ('yolov8_s_auto', True),
    ('yolov5_s_auto', False),
    ('yolox_s_auto', True),
]


def hooks_of(config):
    init_default_scope('mmyolo')
    return [
        HOOKS.build({key: value for key, value in hook.items() if key != 'priority'})
        for hook in config.custom_hooks
    ]


def test_every_recipe_is_tested():
    tested = {name for name, _, _ in RECIPES} | {name for name, _ in LADDERS}
    assert tested == {file.stem for file in FOLDER.glob('*.py')}


@pytest.mark.parametrize('name, epochs, switch', RECIPES)
def test_restart_at_the_switch(name, epochs, switch):
    config = Config.fromfile(FOLDER / f'{name}.py')
    hooks = hooks_of(config)
    restart = next(hook for hook in hooks if isinstance(hook, EMARestartHook))
    assert config.train_cfg.max_epochs == epochs
    for described in (hooks, config.custom_hooks):
        ((name, switches),) = switches_of(described, epochs).items()
        assert (name, [one.epoch for one in switches]) == (restart.rule.follow, [switch])
    assert config.train_dataloader.collate_fn == dict(type='yolov5_collate')
    ema = next(hook for hook in config.custom_hooks if hook.type == 'EMAHook')
    MODELS.get(ema.ema_type)
    built = MODELS.build(
        {k: v for k, v in ema.items() if k not in ('type', 'ema_type', 'priority')}
        | dict(type=ema.ema_type, model=MODELS.build(config.model.backbone))
    )
    assert isinstance(built, RestartableExpMomentumEMA)
    built.restart(restart.rule.steps, restart.rule.momentum, restart.rule.gamma)


@pytest.mark.parametrize('name, switches', LADDERS)
def test_a_ladder_in_place_of_the_average(name, switches):
    config = Config.fromfile(FOLDER / f'{name}.py')
    hooks = hooks_of(config)
    (hook,) = [hook for hook in hooks if isinstance(hook, EMAHook)]
    assert list(hook.ladder.rungs) == ['h0_3', 'h1', 'h3', 'h10', 'h30']
    assert hook.chosen == 'h3'
    assert not any(isinstance(hook, EMARestartHook) for hook in hooks)
    assert bool(switches_of(hooks, config.train_cfg.max_epochs)) is switches
    assert less_is_better('coco/bbox_mAP') is False  # of RTMDet, which saves no best one


def test_the_refresh_is_dfines():
    hook = Config.fromfile(FOLDER / 'rtmdet_s_dfine_refresh.py').custom_hooks[-1]
    assert (hook.source, hook.steps, hook.momentum) == ('best', None, 1e-4)
    assert hook.on_plateau.momentum_add == 1e-4 and hook.on_plateau.after_restart


def megvii(i, lr, warm_up, plain, total):
    """The learning rate of iteration ``i`` in Megvii's YOLOX (``yolox_warm_cos_lr``)."""
    low = 0.05 * lr
    if i <= warm_up:
        return lr * (i / warm_up) ** 2
    if i >= total - plain:
        return low
    angle = math.pi * (i - warm_up) / (total - warm_up - plain)
    return low + (lr - low) * (1 + math.cos(angle)) / 2


def farthest_from_megvii(schedulers, length=1849):
    """The largest distance at any iteration of 300 epochs of COCO, as a part of the peak."""
    init_default_scope('mmyolo')
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    built = [
        PARAM_SCHEDULERS.build(config, default_args=dict(optimizer=optimizer, epoch_length=length))
        for config in schedulers
    ]
    worst = 0
    for i in range(300 * length):
        expected = megvii(i, 0.01, 5 * length, 15 * length, 300 * length)
        worst = max(worst, abs(optimizer.param_groups[0]['lr'] - expected))
        for scheduler in built:
            if not scheduler.by_epoch or (i + 1) % length == 0:
                scheduler.step()
    return worst / 0.01


def test_yolox_has_megviis_learning_rate():
    config = Config.fromfile(FOLDER / 'yolox_s_restart.py')
    assert config.optim_wrapper.optimizer.lr == 0.01
    # The warm-up of MMDetection is one iteration early: 2 / W at its end, W = 5 * 1849.
    assert farthest_from_megvii(config.param_scheduler) < 3e-4
    stock = Config.fromfile(STOCK / 'yolox' / 'yolox_s_fast_8xb8-300e_coco.py')
    assert farthest_from_megvii(stock.param_scheduler, 500) > 0.01
