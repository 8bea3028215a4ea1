"""Plain values of a config, from the text that MMEngine keeps in a checkpoint."""

import pytest
from mmengine.config import Config
from mmengine.hooks import EMAHook as StockEMAHook

import mmema
from mmema.run.config import (
    averages_in,
    ema_hook_in,
    epochs_of,
    hooks_in,
    is_by_epoch,
    is_ours,
    kind_of,
    read_config,
)


def test_the_text_of_a_config_without_running_it(tmp_path):
    config = dict(
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', save_best='a/b'), logger=None),
        custom_hooks=[dict(type='mmema.EMAHook', also=dict(short=dict(momentum=0.1)))],
        train_cfg=dict(max_epochs=3),
    )
    read = read_config(Config(config).pretty_text)
    assert read == config
    assert [kind_of(hook) for hook in hooks_in(read)] == ['CheckpointHook', 'EMAHook']
    assert averages_in(read) == ['short']
    assert read_config(f"import os\nos.mkdir('{tmp_path}/x')\nx = (") == {}
    assert read_config(f"import os\ny = os.mkdir('{tmp_path}/x')\nz = 1") == {'z': 1}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('kind', 'ours'),
    [
        ('EMAHook', False),
        ('mmengine.EMAHook', False),
        ('mmema.EMAHook', True),
        (StockEMAHook, False),
        (mmema.EMAHook, True),
    ],
)
def test_whose_hook_it_is(kind, ours):
    config = dict(custom_hooks=[dict(type='Other'), dict(type=kind)])
    assert is_ours(ema_hook_in(config)) is ours and kind_of(ema_hook_in(config)) == 'EMAHook'
    assert ema_hook_in({}) == {} and not is_ours({})


@pytest.mark.parametrize(
    ('train', 'by_epoch', 'epochs'),
    [
        (dict(max_epochs=3), True, 3),
        (dict(by_epoch=False, max_iters=7), False, 1),
        (dict(type='mmengine.IterBasedTrainLoop', max_iters=7), False, 1),
    ],
)
def test_what_a_run_counts(train, by_epoch, epochs):
    config = dict(train_cfg=train)
    assert (is_by_epoch(config), epochs_of(config)) == (by_epoch, epochs)
