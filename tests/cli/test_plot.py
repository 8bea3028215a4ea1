"""The plan that mmema plot draws is what a real run then does."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from mmengine.config import Config

pytest.importorskip('mmyolo')
from reference import exp_momentum
from runs import LineModel, ema, loader, plain_runner
from twin import train

from mmema.cli import plot
from mmema.restarts.profile import shares
from mmema.run.scalars import Scalars, Validation

EMA = ema(gamma=3)
MAP = 'coco/bbox_mAP'
MONITOR = dict(type='mmema.EMAMonitorHook')
WARM_UP = dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=5)
COSINE = dict(type='CosineAnnealingLR', T_max=4, by_epoch=True, begin=2, convert_to_iter_based=True)
YOLOV5 = dict(type='mmyolo.YOLOv5ParamSchedulerHook', max_epochs=6, warmup_mim_iter=3)


def restart(**kwargs):
    return dict(type='mmema.EMARestartHook', **kwargs)


def make_config(tmp_path, hooks, **kwargs):
    settings = dict(
        train_cfg=dict(by_epoch=True, max_epochs=6),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.05)),
        custom_hooks=hooks,
        model=dict(type='Model'),
    )
    path = tmp_path / 'config.py'
    path.touch()
    return Config({**settings, **kwargs}, filename=str(path))


@pytest.mark.parametrize(
    'hooks, settings',
    [
        ([restart(milestones=[2, 4], steps=2, momentum=[0.05, 0.02])], {}),
        ([restart(every=2), restart(milestones=[7], by_epoch=False, steps=None, gamma=5)], {}),
        ([restart(milestones=[3], steps=0)], dict(param_scheduler=[WARM_UP, COSINE])),
        ([], dict(default_hooks=dict(param_scheduler=YOLOV5))),
        # One restart before iteration 4, with the values of both.
        ([restart(milestones=[2]), restart(every=4, by_epoch=False, steps=None, gamma=5)], {}),
    ],
)
def test_a_run_does_what_was_planned(tmp_path, hooks, settings):
    hooks = [EMA, *hooks, MONITOR]
    config = make_config(tmp_path, hooks, **settings)
    run = plot.run_in(config, 2)
    plan = plot.of_config(run)
    settings = dict(settings)
    settings['default_hooks'] = dict(
        logger=dict(type='LoggerHook', interval=1), **settings.get('default_hooks', {})
    )
    plain_runner(tmp_path, hooks, epochs=6, **settings).train()
    curves = plot.of_scalars(run, tmp_path)
    at, momentum = curves.momenta['ema']
    assert list(at) == list(range(1, 13))
    np.testing.assert_allclose(curves.lr, plan.lr, rtol=1e-6)
    # What is logged after update k is the momentum of the next one. The restart comes in between.
    after = [k for k in range(1, 12) if k not in plan.restarts]
    np.testing.assert_allclose(momentum[:-1][np.array(after) - 1], plan.all_momenta[after])
    if all(hook.get('steps', 0) == 0 for hook in hooks if 'Restart' in hook['type']):
        assert curves.restarts == plan.restarts
        np.testing.assert_allclose(shares(curves.all_momenta), shares(plan.all_momenta))


def test_updates_with_accumulation_are_those_of_the_run(tmp_path):
    # 14 iterations with a step at every fourth and at the last: updates at 3, 7, 11 and 13.
    wrapper = dict(accumulative_counts=4, optimizer=dict(type='SGD', lr=0.05))
    hooks = [dict(EMA, type='mmema.EMAHook'), restart(milestones=[4]), MONITOR]
    settings = dict(optim_wrapper=wrapper, train_cfg=dict(by_epoch=True, max_epochs=7))
    run = plot.run_in(make_config(tmp_path, hooks, **settings), 2)
    plan = plot.of_config(run)
    assert list(plan.momenta['ema'][0]) == [3, 7, 11, 13] and plan.restarts == [8]
    by_hand = [1, exp_momentum(1, 0.1, 3), 1, exp_momentum(1, 0.1, 3)]  # a copy after the restart
    assert plan.all_momenta.tolist() == by_hand
    assert len(plan.lr) == 14
    plain_runner(tmp_path, hooks, epochs=7, optim_wrapper=wrapper).train()
    curves = plot.of_scalars(run, tmp_path)
    assert curves.restarts == plan.restarts
    assert curves.all_momenta.tolist() == pytest.approx(by_hand)


def test_the_axis_of_the_horizon_counts_the_interval(monkeypatch, tmp_path):
    config = make_config(tmp_path, [ema(gamma=3, momentum=0.001, interval=20)])
    run = plot.run_in(config, 100)
    drawn = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: drawn.append(self))
    plot.draw(plot.of_config(run), run, 'nowhere.png')
    (horizon,) = drawn[0].axes[0].child_axes
    # At momentum 0.001 the average remembers 20 / 0.001 updates.
    assert horizon._functions[0](0.001) == pytest.approx(20000)
    assert horizon._functions[1](20000) == pytest.approx(0.001)


def test_the_copy_of_a_hard_restart_is_found_between_two_points():
    # Logged every 4 updates; the restart came before the update with index 5.
    at, steps, counts = np.array([4, 8, 12]), np.array([4, 3, 7]), np.array([0, 1, 1])
    assert plot.restarts_of(at, steps, counts) == [5]
    values = plot.between(at, np.array([0.5, 0.4, 0.2]), steps, counts)
    assert values[5] == 1 and values[0] == 1
    assert values[8:].tolist() == pytest.approx([0.4, 0.35, 0.3, 0.25])
    assert (shares(values)[:5] == 0).all()


def test_begin_of_the_average(tmp_path):
    config = make_config(tmp_path, [ema(gamma=3, begin_epoch=3)])
    plan = plot.of_config(plot.run_in(config, 2))
    assert (plan.all_momenta[:5] == 1).all() and plan.all_momenta[5] < 1


ALSO = dict(
    constant=dict(ema_type='mmema.RestartableConstantEMA', momentum=0.3),
    hard=dict(restart=dict(milestones=[3], gamma=7)),
    soft=dict(momentum=0.2, restart=dict(every=5, by_epoch=False, steps=2)),
    mean=dict(ema_type='mmema.RestartableUniformAverage', restart=dict(milestones=[2, 4])),
    two_epochs=dict(horizon='2 epochs'),
    **{f'more_{number}': dict(momentum=0.01 * number) for number in range(1, 6)},
)
SEVERAL = ema(type='mmema.EMAHook', gamma=3, also=ALSO)


def test_the_plan_of_each_average_is_what_its_run_does(monkeypatch, tmp_path, capsys):
    hooks = [SEVERAL, restart(milestones=[5]), MONITOR]
    val_cfg = dict(type='mmema.EMAValLoop')
    run = plot.run_in(make_config(tmp_path, hooks, val_cfg=val_cfg), 2)
    plan = plot.of_config(run)
    assert list(plan.momenta) == ['ema', *ALSO]
    plain_runner(tmp_path, hooks, epochs=6, val_cfg=val_cfg).train()
    curves = plot.of_scalars(run, tmp_path)
    assert list(curves.momenta) == ['ema', *ALSO]
    moments = dict(ema=[10], hard=[6], soft=[5, 10], mean=[4, 8])
    for name, (_, planned) in plan.momenta.items():
        after = np.array([k for k in range(1, 12) if k not in moments.get(name, [])])
        np.testing.assert_allclose(curves.momenta[name][1][after - 1], planned[after])
    mean = [1, 1 / 2, 1 / 3, 1 / 4]
    np.testing.assert_allclose(plan.momenta['mean'][1], mean + mean + mean)
    assert plan.momenta['constant'][1].tolist() == [1, *11 * [0.3]]
    assert plan.momenta['two_epochs'][1][-1] == pytest.approx(exp_momentum(11, 1 / 4, 3))
    assert plan.momenta['hard'][1][8] == pytest.approx(exp_momentum(2, 0.1, 7))
    assert (
        "note: two_epochs: horizon='2 epochs': momentum 0.0002 -> 0.25" in capsys.readouterr().err
    )
    assert (curves.metric, list(curves.metrics)) == ('toy/mean', ['ema', 'raw', *ALSO])
    assert [len(curve) for curve in curves.metrics.values()] == 12 * [6]

    drawn = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: drawn.append(self))
    plot.draw(curves, run, 'nowhere.png')
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ['EMA', 'raw', *ALSO, 'EMA restart']
    momenta, metrics = drawn[0].axes[0], drawn[0].axes[3]
    assert metrics.get_ylabel() == 'toy/mean' and len(momenta.lines) == 12
    looks = {(line.get_color(), line.get_linestyle()) for line in metrics.lines[:12]}
    assert len(looks) == 12  # no two alike
    box = legend.get_window_extent()
    assert all(not box.overlaps(axis.bbox) for axis in drawn[0].axes)


def test_the_batch_size_counts(tmp_path, capsys):
    hook = dict(
        type='mmema.EMAHook',
        ema_type='mmema.RestartableConstantEMA',
        momentum=0.1,
        base_batch_size=3,
    )
    config = make_config(tmp_path, [hook], train_dataloader=dict(batch_size=6))
    plan = plot.of_config(plot.run_in(config, 2, processes=2))
    assert plan.all_momenta[1:].tolist() == pytest.approx(11 * [0.3439])  # 1 - 0.9 ** 4
    assert 'note: ema: a batch of 12 with base_batch_size=3' in capsys.readouterr().err


def scalars_of(*points):
    return Scalars([], [Validation('', 0, point) for point in points], [])


@pytest.mark.parametrize('prefix', ['raw', 'src'])
def test_metric_curves(prefix):
    points = [{'step': s, MAP: s / 10, f'{prefix}/{MAP}': s / 20} for s in (2, 1)]
    points[0][f'short/{MAP}'] = 0.3
    config = dict(
        custom_hooks=[ema(type='mmema.EMAHook', also=dict(short={}, long={}))],
        val_cfg=dict(type='mmema.EMAValLoop', prefix=prefix),
    )
    metric, curves = plot.metric_curves(config, scalars_of(*points))
    assert metric == MAP
    assert curves == {
        'ema': [(1, 0.1), (2, 0.2)],
        'raw': [(1, 0.05), (2, 0.1)],
        'short': [(2, 0.3)],
    }


def test_the_metric_is_that_of_save_best():
    point = {'step': 1, MAP: 0.1, 'acc': 0.5, 'raw/acc': 0.4, f'raw/{MAP}': 0.2}
    config = dict(val_cfg=dict(type='mmema.EMAValLoop'))
    for save_best in ('acc', 'raw/acc'):
        config['default_hooks'] = dict(checkpoint=dict(type='CheckpointHook', save_best=save_best))
        metric, curves = plot.metric_curves(config, scalars_of(point))
        assert (metric, curves) == ('acc', dict(ema=[(1, 0.5)], raw=[(1, 0.4)]))


def test_an_average_may_have_the_name_of_a_metrics_prefix():
    point = {'step': 1, MAP: 0.1, f'raw/{MAP}': 0.2, f'coco/{MAP}': 0.3}
    config = dict(
        custom_hooks=[ema(type='mmema.EMAHook', also=dict(coco={}))],
        val_cfg=dict(type='mmema.EMAValLoop'),
    )
    metric, curves = plot.metric_curves(config, scalars_of(point))
    assert (metric, curves) == (MAP, dict(ema=[(1, 0.1)], raw=[(1, 0.2)], coco=[(1, 0.3)]))


CONST = """
optim_wrapper = dict(type='AmpOptimWrapper', optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(by_epoch=True, max_epochs=4)
model = dict(type='X')
custom_hooks = [{hooks}]
"""


def call(monkeypatch, folder, *arguments, hooks="dict(type='EMAHook', momentum=0.1)"):
    (folder / 'const.py').write_text(CONST.format(hooks=hooks))
    monkeypatch.chdir(folder)
    plot.main([*arguments])


@pytest.mark.parametrize(
    'leaf',
    [
        'const.py',
        'yolov5/yolov5_s-v61_syncbn_8xb16-300e_coco.py',
        'yolox/yolox_s_fast_8xb8-300e_coco.py',
        'ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py',
    ],
)
def test_draws_a_picture(monkeypatch, tmp_path, leaf):
    import mmyolo

    stock = Path(mmyolo.__file__).parent / '.mim' / 'configs' / leaf
    path = str(stock) if '/' in leaf else leaf
    call(monkeypatch, tmp_path, path, '--iters-per-epoch', '3', '--from', '1', '-o', 'out.png')
    assert (tmp_path / 'out.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    'arguments, hooks, message',
    [
        ([], None, 'no train_dataloader; give the length of an epoch of one process with'),
        (['--iters-per-epoch', '0'], None, 'must be at least 1, got 0'),
        (['--iters-per-epoch', '3', '--processes', '0'], None, '--processes must be at least 1'),
        (
            ['--iters-per-epoch', '3'],
            "dict(type='mmema.EMAHook', "
            "also=dict(a=dict(restart=dict(follow='PipelineSwitchHook'))))",
            "the run cannot be planned: a: follow='PipelineSwitchHook' must name a hook of the run",
        ),
        (
            ['--iters-per-epoch', '3'],
            "dict(type='mmema.EMAHook', base_batch_size=8)",
            'base_batch_size needs the batch size of the run',
        ),
        (['--iters-per-epoch', '3'], '', 'the run must have one EMAHook, got 0'),
        (
            ['--iters-per-epoch', '3'],
            "dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA'), "
            "dict(type='mmema.EMARestartHook', every=1), "
            "dict(type='mmema.EMARestartHook', every=2, steps=3)",
            'two restarts before iteration 6 must agree on steps, got 0 from',
        ),
        (
            ['--iters-per-epoch', '3'],
            "dict(type='EMAHook', ema_type='BaseAveragedModel')",
            "ema_type 'BaseAveragedModel' is not known here",
        ),
        (
            ['--iters-per-epoch', '3'],
            "dict(type='EMAHook'), dict(type='mmema.EMARestartHook', every=1)",
            'ExponentialMovingAverage cannot be restarted, which EMARestartHook wants',
        ),
        (['--iters-per-epoch', '3', '--work-dir', 'nowhere'], None, 'no folder nowhere'),
        (['--iters-per-epoch', '3', '--work-dir', '.'], None, 'wrote no EMA scalars: add dict('),
        (['--iters-per-epoch', '3', '--from', '4'], None, 'below the end of the run, 4, got 4'),
        (['--iters-per-epoch', '3', '-o', 'no/folder.png'], None, 'cannot write no/folder.png'),
        (['--iters-per-epoch', '3', '-o', 'a.xyz'], None, 'cannot write a.xyz'),
    ],
)
def test_refusals(monkeypatch, tmp_path, capsys, arguments, hooks, message):
    hooks = {} if hooks is None else {'hooks': hooks}
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, tmp_path, 'const.py', *arguments, **hooks)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_shares_of_a_run_with_an_interval(tmp_path):
    """Only every fourth update blends, so an epoch has one in two updates of its own."""
    hooks = [ema(interval=4, gamma=5, momentum=0.1), MONITOR]
    settings = dict(train_cfg=dict(by_epoch=True, max_epochs=12))
    run = plot.run_in(make_config(tmp_path, hooks, **settings), 4)
    logger = dict(type='LoggerHook', interval=1)
    checkpoint = dict(type='CheckpointHook', interval=6)
    data = dict(train_dataloader=loader(6, length=24), model=LineModel())
    for saved in (None, checkpoint):
        # First from the scalars alone, then from the record in the last checkpoint.
        runner = plain_runner(
            tmp_path,
            hooks,
            epochs=12,
            default_hooks=dict(logger=logger, checkpoint=saved),
            cfg=Config(dict(custom_hooks=hooks, **settings)),
            val_dataloader=None,
            val_cfg=None,
            val_evaluator=None,
            **data,
        )
        runner.train()
        first, share = plot.shares_of_blocks(plot.of_scalars(run, tmp_path), run)
        momenta = [1.0 if i == 0 else exp_momentum(4 * i, 0.1, 5) for i in range(12)]
        assert list(first) == list(range(0, 48, 4))
        np.testing.assert_allclose(share, 100 * shares(np.array(momenta)), rtol=1e-6)
        assert share[0] == pytest.approx(14.4, abs=0.05)
        assert share[-2:] == pytest.approx([9.0, 10.0], abs=0.05)


def test_shares_of_a_run_that_was_resumed_with_epochs_of_another_length(tmp_path):
    ours = dict(type='mmema.EMAHook', momentum=0.1, gamma=5)
    parts = [dict(stop=11), dict(batch=12)]
    train(tmp_path, MONITOR, ema=ours, epochs=6, parts=parts)
    settings = dict(train_cfg=dict(by_epoch=True, max_epochs=6))
    run = plot.run_in(make_config(tmp_path, [ours, MONITOR], **settings), 2)
    curves = plot.of_scalars(run, tmp_path)
    first, share = plot.shares_of_blocks(curves, run)
    assert list(first) == [0, 4, 8, 10, 12, 14]
    momenta = np.array([1.0] + [exp_momentum(n, 0.1, 5) for n in range(1, 16)])
    np.testing.assert_allclose(share, 100 * np.add.reduceat(shares(momenta), first))
    time = plot.times_of(curves, run.facts)
    np.testing.assert_allclose(time(np.array([2, 8, 9, 16])), [0.5, 2, 2.5, 6])
    plot.draw(curves, run, tmp_path / 'run.png')


def test_a_ladder_is_drawn_with_its_choice(monkeypatch, tmp_path):
    hooks = [dict(type='mmema.EMAHook', horizon='auto'), restart(milestones=[7]), MONITOR]
    settings = dict(train_cfg=dict(by_epoch=True, max_epochs=12))
    checkpoint = dict(type='CheckpointHook', interval=12, save_best='toy/mean', rule='less')
    logger = dict(type='LoggerHook', interval=1)
    settings['default_hooks'] = dict(checkpoint=checkpoint, logger=logger)
    run = plot.run_in(make_config(tmp_path, hooks, **settings), 2)
    plan = plot.of_config(run)
    assert list(plan.momenta) == ['ema', 'h10', 'h30'] and plan.restarts == [14]
    # max(1 / horizon, 2 / (2 + steps)): 10 and 30 % of 24 updates
    by_hand = [1, *(max(1 / 7.2, 2 / (2 + steps)) for steps in range(1, 14))]
    assert plan.momenta['h30'][1].tolist() == pytest.approx(by_hand + by_hand[:10])
    settings.pop('train_cfg')
    plain_runner(tmp_path, hooks, epochs=12, **settings).train()
    curves = plot.of_scalars(run, tmp_path)
    assert [at for at, _ in curves.chosen] == list(range(1, 13))
    drawn = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, *args, **kwargs: drawn.append(self))
    plot.draw(curves, run, 'nowhere.png')
    last = drawn[0].axes[-1]
    assert [label.get_text() for label in last.get_yticklabels()] == ['raw', 'h10', 'h30']
    (line,) = last.lines[:1]
    assert list(line.get_ydata()) == [index for _, index in curves.chosen]
