"""The recipes: what they change in the stock configs, and that their parts build."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope

from mmema import EMARestartHook, RestartableExpMomentumEMA
from mmema.restarts.moments import switch_epochs

pytest.importorskip('mmyolo')
FOLDER = Path(__file__).parents[1] / 'configs' / 'coco'

# Name, epochs, 0-based epoch of the restart.
RECIPES = [
    ('rtmdet_s_restart', 300, 280),
    ('rtmdet_s_dfine_refresh', 300, 280),
    ('yolov8_s_restart', 500, 490),
    ('yolov5_s_restart', 300, 285),
    ('yolox_s_restart', 300, 284),  # its hook switches one epoch earlier than its argument says
]


def hooks_of(config):
    init_default_scope('mmyolo')
    return [
        HOOKS.build({key: value for key, value in hook.items() if key != 'priority'})
        for hook in config.custom_hooks
    ]


def test_every_recipe_is_tested():
    assert {name for name, _, _ in RECIPES} == {file.stem for file in FOLDER.glob('*.py')}


@pytest.mark.parametrize('name, epochs, switch', RECIPES)
def test_restart_at_the_switch(name, epochs, switch):
    config = Config.fromfile(FOLDER / f'{name}.py')
    runner = SimpleNamespace(hooks=hooks_of(config), max_epochs=config.train_cfg.max_epochs)
    restart = next(hook for hook in runner.hooks if isinstance(hook, EMARestartHook))
    assert runner.max_epochs == epochs
    assert switch_epochs(runner, restart.follow) == [switch]
    assert config.train_dataloader.collate_fn == dict(type='yolov5_collate')
    ema = next(hook for hook in config.custom_hooks if hook.type == 'EMAHook')
    MODELS.get(ema.ema_type)
    built = MODELS.build(
        {k: v for k, v in ema.items() if k not in ('type', 'ema_type', 'priority')}
        | dict(type=ema.ema_type, model=MODELS.build(config.model.backbone))
    )
    assert isinstance(built, RestartableExpMomentumEMA)
    built.restart(restart.steps, restart.momentum, restart.gamma)


def test_the_refresh_is_dfines():
    hook = Config.fromfile(FOLDER / 'rtmdet_s_dfine_refresh.py').custom_hooks[-1]
    assert (hook.source, hook.steps, hook.momentum) == ('best', None, 1e-4)
    assert hook.on_plateau.momentum_add == 1e-4 and hook.on_plateau.after_restart


def test_yolox_has_megviis_learning_rate():
    config = Config.fromfile(FOLDER / 'yolox_s_restart.py')
    (scheduler,) = config.param_scheduler
    assert (scheduler.type, scheduler.warm_up, scheduler.plain, scheduler.total) == (
        'mmema.YOLOXWarmCosLR', 5, 15, 300,
    )  # fmt: skip
