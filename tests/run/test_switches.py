"""When a switch hook switches, from the hook and from its settings, and the pipeline that holds."""

import pytest
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmema.run import switches_of
from mmema.run.switches import Switch, use_last_pipeline


class SwitchRecipeHook(Hook):
    """As MMPretrain's, which keeps its recipes by the number of their epoch, from 1."""

    def __init__(self, schedule):
        self.schedule = {
            recipe['action_epoch']: {'train_pipeline': 'unchange', **recipe} for recipe in schedule
        }


MOSAIC = ('Mosaic', 'RandomAffine', 'MixUp')
NEW = [dict(type='New')]


@pytest.mark.parametrize(
    ('settings', 'epochs', 'switches'),
    [
        (dict(type='mmdet.PipelineSwitchHook', switch_epoch=7), 9, [Switch(7, NEW)]),
        (dict(type='mmdet.PipelineSwitchHook', switch_epoch=-1), 9, [Switch(0, NEW)]),
        # It compares epoch + 1: one epoch earlier than its argument says.
        (dict(type='mmdet.YOLOXModeSwitchHook'), 20, [Switch(4, None, MOSAIC)]),
        (dict(type='mmdet.YOLOXModeSwitchHook', num_last_epochs=9), 3, [Switch(0, None, MOSAIC)]),
        (dict(type='mmyolo.YOLOXModeSwitchHook'), 20, [Switch(4, NEW)]),
        (dict(type='mmyolo.YOLOXModeSwitchHook'), 15, []),  # in that epoch or never
        (dict(type='mmyolo.YOLOXModeSwitchHook', new_train_pipeline=None), 15, []),
    ],
)
def test_hooks_and_their_settings_say_the_same(settings, epochs, switches):
    library, name = settings['type'].split('.')
    pytest.importorskip(f'{library}.engine')
    if 'PipelineSwitch' in name:
        settings = dict(settings, switch_pipeline=NEW)
    elif library == 'mmyolo':
        settings = {'new_train_pipeline': NEW, **settings}
    hook = HOOKS.build(settings)
    by_class = dict(settings, type=type(hook))
    for described in (hook, settings, by_class):
        assert switches_of([described], epochs) == {name: switches}


def test_recipes_count_from_one():
    schedule = [dict(action_epoch=3, train_pipeline=NEW)]
    schedule += [dict(action_epoch=epoch, batch_augments=None) for epoch in (2, 0, None)]
    for hook in (SwitchRecipeHook(schedule), dict(type='SwitchRecipeHook', schedule=schedule)):
        found = switches_of([hook], 3)
        assert found == {'SwitchRecipeHook': [Switch(1), Switch(2, NEW)]}


def test_the_class_of_a_derived_hook_tells():
    class Mine(SwitchRecipeHook):
        pass

    schedule = [dict(action_epoch=3, train_pipeline=NEW)]
    for hook in (Mine(schedule), dict(type=Mine, schedule=schedule)):
        assert switches_of([hook], 3) == {'SwitchRecipeHook': [Switch(2, NEW)]}


def switch(epoch, *names):
    pipeline = [dict(type=name) for name in names]
    return dict(type='PipelineSwitchHook', switch_epoch=epoch, switch_pipeline=pipeline)


YOLOX = dict(type='YOLOXModeSwitchHook', num_last_epochs=5)
RECIPE = [dict(action_epoch=at, train_pipeline=[dict(type=f'At{at}')]) for at in (30, 10)]
RECIPE += [dict(action_epoch=40, batch_augments=None)]
RECIPE = dict(type='SwitchRecipeHook', schedule=RECIPE)


@pytest.mark.parametrize(
    ('hooks', 'train', 'left'),
    [
        ([switch(20, 'Mosaic', 'Flip'), switch(10, 'Crop')], 40, ['Mosaic', 'Flip']),
        ([YOLOX, switch(20, 'Mosaic', 'Flip'), switch(10, 'Crop')], 40, ['Flip']),
        ([RECIPE], 40, ['At30']),
        # A run that ends before a switch never has that pipeline.
        ([switch(20, 'Mosaic', 'Flip'), switch(10, 'Crop')], 20, ['Crop']),
        ([switch(20, 'Mosaic', 'Flip')], 15, ['MixUp']),
        ([RECIPE], 29, ['At10']),
        ([dict(YOLOX, new_train_pipeline=NEW)], 5, ['MixUp']),
        # One by iterations has a single epoch for MMEngine.
        ([switch(1, 'Crop')], dict(type='IterBasedTrainLoop', max_iters=500), ['MixUp']),
    ],
)
def test_the_pipeline_that_a_run_ends_with(hooks, train, left):
    train = train if isinstance(train, dict) else dict(by_epoch=True, max_epochs=train)
    dataset = dict(type='Wrapper', dataset=dict(type='Data', pipeline=[dict(type='MixUp')]))
    if YOLOX in hooks:
        dataset = dataset['dataset']
    loader = dict(dataset=dataset)
    config = Config(dict(custom_hooks=hooks, train_cfg=train, train_dataloader=loader))
    stage = use_last_pipeline(config)
    dataset = config.train_dataloader.dataset
    assert [step.type for step in dataset.get('dataset', dataset).pipeline] == left
    assert ('has switched' in stage) == (left != ['MixUp'])
