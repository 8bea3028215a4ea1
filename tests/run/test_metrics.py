"""The metric that a run watches: one answer, from hooks and from a config."""

import pytest
from mmengine.hooks import CheckpointHook

from mmema.run import watched_metric
from mmema.run.metrics import Watched, main_names, prefixes_in

MAP = 'coco/bbox_mAP'
PREFIXES = ['raw/', 'short/']


@pytest.mark.parametrize(
    ('save_best', 'rule', 'expected'),
    [
        ('coco/bbox_mAP_50', None, Watched('coco/bbox_mAP_50', False)),
        (['coco/bbox_mAP_50', MAP], 'greater', Watched('coco/bbox_mAP_50', False)),
        (['gone/mAP', 'error'], ['greater', 'less'], Watched('error', True)),
        ('raw/error', 'less', Watched('error', True)),
        (f'short/{MAP}', None, Watched(MAP, False)),
        ('auto', 'less', Watched(MAP, True)),
        ('auto', None, Watched(MAP, False)),
        (None, None, Watched(MAP, False)),
    ],
)
def test_hooks_and_their_settings_say_the_same(save_best, rule, expected):
    settings = dict(save_best=save_best, rule=rule)
    for hook in (CheckpointHook(**settings), dict(type='CheckpointHook', **settings)):
        names = [MAP, 'coco/bbox_mAP_50', 'error']
        assert watched_metric([hook], names, PREFIXES) == expected


def test_what_a_person_asks_for_comes_first():
    hooks = [dict(type='CheckpointHook', save_best=['error', 'loss'], rule=['greater', None])]
    names = [MAP, 'error', 'other']
    assert watched_metric(hooks, names) == Watched('error', False)
    assert watched_metric(hooks, names, rule='less') == Watched('error', True)
    assert watched_metric(hooks, names, metric='error') == Watched('error', False)
    assert watched_metric(hooks, names, metric=MAP) == Watched(MAP, False)
    assert watched_metric(hooks, names, metric='other') == Watched('other', None)
    assert watched_metric(hooks, names, metric='gone', rule='less') == Watched('gone', True)
    assert watched_metric([], []) == Watched(None, None)


def test_the_names_of_the_main_average():
    measured = ['step', 'time', 'data_time', MAP, f'raw/{MAP}', f'short/{MAP}', 'raw/error']
    assert main_names(measured, PREFIXES) == [MAP, 'error']
    assert main_names([f'raw/{MAP}'], PREFIXES) == [MAP]  # the main one has found nothing


def test_an_average_may_have_the_name_of_a_metrics_prefix():
    prefixes = ['raw/', 'coco/']
    assert main_names([f'raw/{MAP}', f'coco/{MAP}', MAP], prefixes) == [MAP]
    assert main_names([MAP, f'coco/{MAP}'], ['coco/']) == [MAP]
    hook = CheckpointHook(save_best=MAP)
    assert watched_metric([hook], [MAP], prefixes) == Watched(MAP, False)


def test_prefixes_are_of_the_weights_that_the_loop_evaluates():
    also = dict(short=dict(), coco=dict())
    hooks = [dict(type='mmema.EMAHook', also=also)]
    loop = dict(type='mmema.EMAValLoop')

    def prefixes(**loop):
        return prefixes_in(dict(custom_hooks=hooks, val_cfg=loop))

    everything = dict(raw='raw/', short='short/', coco='coco/')
    assert prefixes(**loop) == everything
    assert prefixes(**loop, prefix='src/') == {**everything, 'raw': 'src/'}
    assert prefixes(**loop, weights=['short']) == dict(short='short/')
    assert prefixes() == prefixes(type='ValLoop') == {}
    assert prefixes_in(dict(custom_hooks=hooks)) == everything
    assert prefixes_in({}, ['short']) == dict(raw='raw/', short='short/')
