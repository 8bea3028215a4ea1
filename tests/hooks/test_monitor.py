from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from reference import exp_momentum
from runs import ema, loader, plain_runner, points
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import mmema
import mmema.hooks.monitor as monitor
from mmema.hooks.monitor import relative_distance
from mmema.run import ema_hook_of

MONITOR = dict(type='mmema.EMAMonitorHook')
NAMES = ['momentum', 'horizon', 'steps', 'restarts', 'distance']


def test_distance_by_hand():
    average, source = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        for model, weight, bias in ((average, [3.0, 1.0], 2.0), (source, [1.0, 2.0], 0.0)):
            model.weight.copy_(torch.tensor([weight]))
            model.bias.fill_(bias)
    # sqrt(2^2 + 1^2 + 2^2) / sqrt(1^2 + 2^2)
    assert relative_distance(average, source) == pytest.approx(3 / 5**0.5)


def test_distance_counts_a_tied_tensor_once():
    def tied():
        model = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(3)])
        model[1].weight = model[0].weight
        return model

    average, source = tied(), tied()
    with torch.no_grad():
        for model, first, last in ((average, 0.0, 1.0), (source, 3.0, 4.0)):
            model[0].weight.fill_(first)
            model[2].weight.fill_(last)
    assert relative_distance(average, source) == pytest.approx((9 + 9) ** 0.5 / 5)


class Restart(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            ema_hook_of(runner).ema_model.restart(steps=2, momentum=0.05)


def test_scalars_of_a_run(tmp_path):
    class Keep(Hook):
        priority = 'LOWEST'
        distances = []

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            average = ema_hook_of(runner).ema_model.module
            pairs = [*zip(average.parameters(), runner.model.parameters())]
            apart = sum(float(((a - s) ** 2).sum()) for a, s in pairs)
            self.distances.append((apart / sum(float((s**2).sum()) for _, s in pairs)) ** 0.5)

    keep = Keep()
    # The monitor stands before EMAHook and still sees the updated average.
    runner = plain_runner(tmp_path, [MONITOR, ema(gamma=2), Restart(), keep])
    runner.train()
    train = [point for point in points(runner) if 'loss' in point]
    assert len(train) == 6
    steps = [1, 2, 3, 3, 4, 5]  # the restart sets 3 to 2 before the fourth update
    momenta = [exp_momentum(s, 0.1 if i < 3 else 0.05, 2) for i, s in enumerate(steps)]
    assert [point['ema_steps'] for point in train] == steps
    assert [point['ema_restarts'] for point in train] == [0, 0, 0, 1, 1, 1]
    assert [point['ema_momentum'] for point in train] == pytest.approx(momenta)
    assert [point['ema_horizon'] for point in train] == [round(1 / m) for m in momenta]
    distances = [point['ema_distance'] for point in train]
    assert distances == pytest.approx(keep.distances, rel=1e-5, abs=1e-7)
    assert distances[0] == 0 and distances[-1] > 1e-4
    log = next(Path(runner._log_dir).glob('*.log')).read_text()
    line = [line for line in log.splitlines() if 'Epoch(train)' in line][-1]
    text = f'ema_momentum: {momenta[-1]:.4f}  ema_horizon: 10  ema_steps: 5  ema_restarts: 1  '
    text += f'ema_distance: {distances[-1]:.4f}'
    assert text in line


def test_the_horizon_counts_updates_of_which_only_some_blend():
    model = nn.Linear(1, 1)
    average = mmema.RestartableConstantEMA(model, momentum=0.001, interval=20)
    average.steps.fill_(20)  # the first update copies
    horizon = monitor.state_of(average)['horizon']
    assert horizon == 20_000  # 1 / momentum would be 1,000
    # From 0 towards 1: what the average holds of its last 20,000 updates, and of its last 1,000.
    with torch.no_grad():
        average.module.weight.zero_()
        model.weight.fill_(1)
    for updates, share in ((1000, 1 - 0.999**50), (horizon - 1000, 1 - 0.999**1000)):
        for _ in range(updates):
            average.update_parameters(model)
        assert average.module.weight.item() == pytest.approx(share, rel=1e-4)
    assert share == pytest.approx(0.632, abs=1e-3)


def test_tensorboard(tmp_path):
    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    visualizer = dict(type='Visualizer', vis_backends=backends)
    runner = plain_runner(tmp_path, [ema(), MONITOR], visualizer=visualizer)
    runner.train()
    events = EventAccumulator(f'{runner._log_dir}/vis_data').Reload()
    local = [point for point in points(runner) if 'loss' in point]
    for name in NAMES:
        read = events.Scalars(f'ema_{name}')
        assert [event.step for event in read] == [1, 2, 3, 4, 5, 6]
        expected = [point[f'ema_{name}'] for point in local]
        assert [event.value for event in read] == pytest.approx(expected)


@pytest.mark.parametrize(
    'logger, own, expected',
    [
        (dict(interval=2), None, [2, 4]),  # five iterations an epoch; the last is ignored
        (dict(interval=2, ignore_last=False), None, [2, 4, 5]),
        (dict(interval=10), None, [5]),
        (dict(interval=2), 3, [3]),
    ],
)
def test_measures_only_where_the_logger_writes(tmp_path, monkeypatch, logger, own, expected):
    at = []
    measure = monitor.relative_distance

    class Iteration(Hook):
        priority = 'HIGHEST'

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.now = batch_idx + 1

    iteration = Iteration()
    monkeypatch.setattr(
        monitor, 'relative_distance', lambda *args: at.append(iteration.now) or measure(*args)
    )
    runner = plain_runner(
        tmp_path,
        [iteration, ema(), dict(**MONITOR, interval=own)],
        epochs=2,
        train_dataloader=loader(batch_size=2, length=10, shuffle=False),
        default_hooks=dict(logger=dict(type='LoggerHook', **logger)),
    )
    runner.train()
    written = [point['step'] for point in points(runner) if 'loss' in point]
    assert at == expected * 2
    if own is None:
        assert len(written) == len(at)


def test_a_stock_average_tells_what_it_has(tmp_path):
    stock = dict(type='EMAHook', ema_type='ExponentialMovingAverage')
    runner = plain_runner(tmp_path, [stock, MONITOR])
    runner.train()
    seen = {name for name in points(runner)[0] if name.startswith('ema_')}
    assert seen == {'ema_steps', 'ema_distance'}


def test_without_an_emahook(tmp_path):
    with pytest.raises(ValueError, match='the run must have one EMAHook, got 0'):
        plain_runner(tmp_path, [MONITOR]).train()


@pytest.mark.parametrize(
    'interval, error, message',
    [
        (0, ValueError, 'interval must be at least 1, got 0'),
        (-1, ValueError, 'interval must be at least 1, got -1'),
        (2.5, TypeError, 'interval must be an integer, got 2.5'),
        (True, TypeError, 'interval must be an integer, got True'),
        ('10', TypeError, "interval must be an integer, got '10'"),
    ],
)
def test_bad_interval(interval, error, message):
    with pytest.raises(error, match=message):
        monitor.EMAMonitorHook(interval=interval)
