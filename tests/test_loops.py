from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from runs import (
    Mean,
    NormModel,
    Score,
    assert_same,
    ema,
    log_of,
    make_runner,
    plain_runner,
    points,
    state_of,
)

from mmema.run import ema_hook_of

BOTH = dict(type='mmema.EMAValLoop')
EMA_HOOKS = pytest.mark.parametrize('hook', ['EMAHook', 'mmema.EMAHook'])


def mean_of(weights, runner):
    """The metric worked out by hand with the given weights."""
    model = NormModel()
    model.load_state_dict(weights)
    model.eval()
    data = runner.val_dataloader.dataset
    with torch.no_grad():
        errors = [model(s['x'][None], s['y'][None], 'predict')[0]['error'] for s in data]
    return float(torch.stack(errors).mean())


class Keep(Hook):
    """Keeps the weights and the metrics of each validation, and which hooks were called."""

    priority = 'LOWEST'

    def __init__(self):
        self.raw, self.ema, self.metrics, self.calls = [], [], [], []

    def after_train_epoch(self, runner):
        average = ema_hook_of(runner).ema_model.module
        for kept, model in ((self.raw, runner.model), (self.ema, average)):
            kept.append({k: v.clone() for k, v in model.state_dict().items()})

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.calls.append(batch_idx)

    def after_val_epoch(self, runner, metrics=None):
        self.metrics.append(dict(metrics))


@EMA_HOOKS
@pytest.mark.parametrize('update_buffers', [False, True])
def test_both_weights_are_evaluated(tmp_path, hook, update_buffers):
    keep = Keep()
    average = ema(type=hook, update_buffers=update_buffers)
    runner = plain_runner(tmp_path, [average, keep], val_cfg=BOTH)
    runner.train()
    assert len(keep.metrics) == 3
    for raw, average, metrics in zip(keep.raw, keep.ema, keep.metrics):
        assert list(metrics) == [
            'toy/mean',
            'toy/worst',
            'raw/toy/mean',
            'raw/toy/worst',
        ]
        assert metrics['toy/mean'] == pytest.approx(mean_of(average, runner), abs=1e-6)
        assert metrics['raw/toy/mean'] == pytest.approx(mean_of(raw, runner), abs=1e-6)
    assert metrics['toy/mean'] != pytest.approx(metrics['raw/toy/mean'], abs=1e-3)
    assert keep.calls == [0, 1] * 3  # hooks see the batches once


@EMA_HOOKS
def test_training_goes_on_as_with_the_stock_loop(tmp_path, hook):
    states = []
    for name, val_cfg in (('stock', {}), ('both', BOTH)):
        runner = plain_runner(
            tmp_path / name, [ema(type=hook)], model=NormModel(dropout=0.5), val_cfg=val_cfg
        )
        runner.train()
        states.append(state_of(runner))
    assert_same(*states)


def test_log_and_best_checkpoint(tmp_path):
    checkpoint = dict(type='CheckpointHook', interval=1, save_best='auto', rule='greater')
    logger = dict(type='LoggerHook', interval=1)
    runner = plain_runner(
        tmp_path, [ema()], val_cfg=BOTH, default_hooks=dict(checkpoint=checkpoint, logger=logger)
    )
    runner.train()
    assert 'best_toy_mean_epoch' in runner.message_hub.get_info('best_ckpt')
    validations = [point for point in points(runner) if 'raw/toy/mean' in point]
    assert [point['step'] for point in validations] == [1, 2, 3]
    assert all('toy/mean' in point for point in validations)


@pytest.mark.parametrize('silent', ['raw', 'ema'])
def test_no_metric_of_one_of_them(tmp_path, silent):
    def is_silent(results, calls=[]):  # noqa: B006
        calls.append(results)
        return (len(calls) % 2 == 1) == (silent == 'raw')  # raw goes first

    keep = Keep()
    checkpoint = dict(type='CheckpointHook', interval=1, save_best='toy/mean', rule='greater')
    runner = plain_runner(
        tmp_path,
        [ema(), keep],
        val_cfg=BOTH,
        val_evaluator=[Mean(is_silent)],
        default_hooks=dict(checkpoint=checkpoint),
    )
    runner.train()
    expected = ['toy/mean', 'toy/worst'] if silent == 'raw' else []
    assert [list(metrics) for metrics in keep.metrics] == [expected] * 3
    in_log = 'val/raw/toy/mean' in runner.message_hub.log_scalars
    assert in_log == (silent == 'ema')


class Fail(Hook):
    def __init__(self, error):
        self.error = error

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        raise self.error


@EMA_HOOKS
@pytest.mark.parametrize('error', [RuntimeError('no memory'), KeyboardInterrupt()])
def test_an_error_leaves_the_raw_weights_in_the_model(tmp_path, hook, error):
    # MMEngine's loop leaves the EMA weights there.
    keep = Keep()
    hooks = [
        ema(type=hook, update_buffers=True),
        dict(type='EMARecalibrateHook'),
        keep,
        Fail(error),
    ]
    runner = plain_runner(tmp_path, hooks, val_cfg=BOTH, epochs=1)
    with pytest.raises(type(error)):
        runner.train()
    for kept, model in (
        (keep.raw, runner.model),
        (keep.ema, ema_hook_of(runner).ema_model.module),
    ):
        assert all(torch.equal(kept[0][k], v) for k, v in model.state_dict().items())
    assert not runner.val_evaluator.metrics[0].results


def test_validation_alone_evaluates_once(tmp_path):
    runner = plain_runner(tmp_path, [ema()], val_cfg=BOTH)
    assert list(runner.val()) == ['toy/mean', 'toy/worst']


def test_without_an_emahook(tmp_path):
    runner = plain_runner(tmp_path, [], val_cfg=BOTH)
    with pytest.raises(
        ValueError, match='EMAValLoop evaluates several weights: the run must have one'
    ):
        runner.train()


@pytest.mark.parametrize(
    'prefix, error, message',
    [
        (3, TypeError, 'prefix must be a string, got 3'),
        ('/', ValueError, "be empty or .*, got '/'"),
    ],
)
def test_bad_prefix(tmp_path, prefix, error, message):
    runner = plain_runner(tmp_path, [ema()], val_cfg=dict(**BOTH, prefix=prefix))
    with pytest.raises(error, match=message):
        runner.train()


def test_other_prefix(tmp_path):
    keep = Keep()
    plain_runner(tmp_path, [ema(), keep], val_cfg=dict(**BOTH, prefix='source/')).train()
    assert 'source/toy/mean' in keep.metrics[0]


@pytest.mark.parametrize(
    'checkpoint, header',
    [
        (dict(save_best='raw/toy/mean', rule='less'), ['weights', 'best', 'epoch', 'last']),
        (dict(save_best='toy/mean', rule='less'), ['weights', 'best', 'epoch', 'last']),
        (dict(), ['weights', 'last']),  # is more of it better? Nobody says
    ],
)
def test_the_table_of_a_metric_of_which_less_is_better(tmp_path, checkpoint, header):
    keep = Keep()
    settings = dict(type='CheckpointHook', interval=1, **checkpoint)
    average = ema(type='mmema.EMAHook')
    hooks = dict(checkpoint=settings)
    runner = plain_runner(tmp_path, [average, keep], val_cfg=BOTH, default_hooks=hooks)
    runner.train()
    lines = log_of(runner).split('toy/mean of all weights\n')[1].splitlines()[:3]
    rows = [line.split() for line in lines]
    assert rows[0] == header and [row[0] for row in rows[1:]] == ['ema', 'raw']
    for name, *cells in rows[1:]:
        key = 'toy/mean' if name == 'ema' else f'{name}/toy/mean'
        values = [metrics[key] for metrics in keep.metrics]
        assert float(cells[-1]) == pytest.approx(values[-1], abs=1e-4)
        if checkpoint:
            assert float(cells[0]) == pytest.approx(min(values), abs=1e-4)
            assert values[int(cells[1]) - 1] == min(values)


# --- the table after a resume ---------------------------------------------------------------------


def rows_of(runner, metric):
    """Return the last table in the log of a run, by the name of the weights."""
    log = next(Path(runner._log_dir).glob('*.log')).read_text()  # not that of an earlier part
    head, *table = log.split(f'{metric} of all weights\n')[-1].splitlines()
    assert head.split() == ['weights', 'best', 'epoch', 'last']
    return {cells[0]: cells[1:] for cells in map(str.split, table[:2])}


class Time(Hook):
    """Tells the scripted metric the epoch, also where the raw weights are evaluated."""

    def after_train_epoch(self, runner):
        Score.now = runner.epoch + 1


def scored_run(folder, epochs, **settings):
    script = [None, 0.1, 0.9, 0.2]
    runner = make_runner(folder, Time(), epochs=epochs, val_cfg=BOTH, script=script, **settings)
    runner.train()
    return runner


@pytest.mark.parametrize('elsewhere', [False, True])
def test_the_table_of_a_resumed_run_has_the_validation_after_its_checkpoint(tmp_path, elsewhere):
    # The checkpoint of an epoch is saved before the validation of that epoch.
    scored_run(tmp_path / 'first', epochs=2)
    folder, settings = tmp_path / 'first', {}
    if elsewhere:
        folder = tmp_path / 'second'
        settings = dict(load_from=str(tmp_path / 'first/epoch_2.pth'))
    runner = scored_run(folder, epochs=3, resume=True, **settings)
    expected = ['0.9000', '2', '0.2000']
    assert rows_of(runner, 'score') == {'ema': expected, 'raw': expected}


def test_scores_that_do_not_name_their_metric_are_those_of_the_log(tmp_path):
    scored_run(tmp_path, epochs=2)
    checkpoint = torch.load(tmp_path / 'epoch_2.pth')
    old = dict(ema=[(1, 0.7)], raw=[(1, 0.7)])  # as mmema 0.1.0 saved them
    checkpoint['message_hub']['runtime_info']['ema_scores'] = old
    torch.save(checkpoint, tmp_path / 'epoch_2.pth')
    runner = scored_run(tmp_path, epochs=3, resume=True)
    assert rows_of(runner, 'score')['ema'] == ['0.9000', '2', '0.2000']


def test_the_table_has_no_validation_that_is_not_of_the_run(tmp_path):
    # Resumed from the first epoch of three, whose second one is not validated again.
    scored_run(tmp_path / 'first', epochs=3)
    settings = dict(load_from=str(tmp_path / 'first/epoch_1.pth'), val_interval=3)
    runner = scored_run(tmp_path / 'second', epochs=3, resume=True, **settings)
    assert rows_of(runner, 'score')['ema'] == ['0.2000', '3', '0.2000']


@pytest.mark.parametrize('rule', ['less', 'greater'])
@pytest.mark.parametrize('logged', [True, False])
def test_the_table_after_a_change_of_the_metric_has_scores_of_the_new_one(tmp_path, logged, rule):
    keep = Keep()
    for epochs, metric in ((2, 'toy/mean'), (3, 'toy/worst')):
        checkpoint = dict(type='CheckpointHook', interval=1, save_best=metric, rule=rule)
        runner = plain_runner(
            tmp_path,
            [ema(), keep],
            epochs=epochs,
            val_cfg=BOTH,
            default_hooks=dict(checkpoint=checkpoint),
            resume=epochs == 3,
        )
        runner.train()
        if not logged:
            for file in tmp_path.rglob('scalars.json'):
                file.unlink()
    values = [metrics['toy/worst'] for metrics in keep.metrics]
    best = (min if rule == 'less' else max)(values if logged else values[2:])
    rows = rows_of(runner, 'toy/worst')
    assert rows['ema'] == [f'{best:.4f}', str(values.index(best) + 1), f'{values[2]:.4f}']
