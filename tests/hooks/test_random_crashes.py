"""Random runs, stopped up to three times at random places, end with the unbroken run's bits."""

import contextlib
import random

import pytest
from marks import SEED, extensive
from runs import EMA, Crash, LineModel, assert_same, make_runner, state_of
from torch import nn

PLACES = [
    f'{when}_{what}'
    for when in ('before', 'after')
    for what in ('train_iter', 'val_epoch', 'train_epoch')
]


def model_of(kind):
    model = LineModel()
    if kind == 'tied':
        model.layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 1))
        model.layers[2].weight = model.layers[0].weight
    elif kind == 'frozen':
        model.layers[0].weight.requires_grad_(False)
    return model


def random_hook(chance, by_iter):
    arguments = {}
    if chance.random() < 0.5:
        by_epoch = not by_iter and chance.random() < 0.5
        moments = chance.sample(range(1, 6 if by_epoch else 23), 2)
        arguments.update(milestones=sorted(moments), by_epoch=by_epoch)
    elif chance.random() < 0.5:
        arguments.update(every=chance.choice([3, 5, 7]), by_epoch=False)
    if not arguments or chance.random() < 0.5:
        arguments['on_plateau'] = dict(
            metric='score',
            patience=chance.choice([1, 2]),
            momentum_add=0.01,
            source=chance.choice([None, 'best', 'ema']),
            after_restart='milestones' in arguments and chance.random() < 0.5,
        )
    return dict(
        type='mmema.EMARestartHook',
        steps=chance.choice([0, 3]),
        source=chance.choice(['model', 'ema', 'best', 'best']),
        gamma=chance.choice([None, 9]),
        **arguments,
    )


def random_run(chance):
    """Return hooks and settings for make_runner, and the kind of the model."""
    by_iter = chance.random() < 0.4
    settings = dict(
        script=[round(chance.random(), 2) for _ in range(30)],
        val_interval=chance.choice([2, 4, 5] if by_iter else [1, 1, 2, 3]),
        ema=dict(
            EMA,
            type=chance.choice(['EMAHook', 'mmema.EMAHook']),
            update_buffers=chance.random() < 0.5,
            interval=chance.choice([1, 1, 3]),
            begin_iter=chance.choice([0, 0, 5, 9]),
            exclude=chance.choice([(), ['layers.0.*']]),
        ),
        checkpoint=dict(interval=chance.choice([1, 2, 3]), max_keep_ckpts=chance.choice([-1, 2])),
    )
    if by_iter:
        settings['iters'] = 24
    hooks = [random_hook(chance, by_iter) for _ in range(chance.choice([1, 1, 2]))]
    for hook in hooks[1:]:  # hooks that meet at one iteration may not contradict each other
        hook.update({name: hooks[0][name] for name in ('steps', 'gamma', 'source')})
    return hooks, settings, chance.choice(['plain', 'plain', 'tied', 'frozen'])


@pytest.mark.slow
@pytest.mark.parametrize('seed', [*range(30), *extensive((SEED + i,) for i in range(30, 300))])
def test_the_same_bits(tmp_path, seed):
    chance = random.Random(seed)
    hooks, settings, kind = random_run(chance)
    whole = make_runner(tmp_path / 'whole', *hooks, model=model_of(kind), **settings)
    whole.train()
    for number in range(chance.choice([1, 2, 3])):
        crash = Crash(chance.randint(0, 23), chance.choice(PLACES))
        cut = make_runner(
            tmp_path / 'cut', *hooks, crash, model=model_of(kind), resume=number > 0, **settings
        )
        with contextlib.suppress(KeyboardInterrupt):
            cut.train()
    resumed = make_runner(tmp_path / 'cut', *hooks, model=model_of(kind), resume=True, **settings)
    resumed.train()
    assert_same(state_of(whole), state_of(resumed))
