"""Several averages in one run: each is the one that a run of its own would have made."""

import contextlib
import random
import re

import pytest
import torch
from marks import SINCE_TORCH_2_6
from mmengine.hooks import Hook
from runs import EMA, Crash, assert_same, log_of, make_runner, predicted, state_of

import mmema
from mmema.averages import config
from mmema.messages import RunError
from mmema.run import averages_of, ema_hook_of
from mmema.update import follower

OURS = dict(EMA, type='mmema.EMAHook')
SCORES = [0.1, 0.5, 0.4, 0.3, 0.6, 0.2, 0.2, 0.2]
ALL = dict(type='mmema.EMAValLoop')
ALSO = dict(
    short=dict(momentum=0.3),
    buffers=dict(update_buffers=True, interval=3, exclude=['layers.0.*']),
    hard=dict(gamma=3, restart=dict(milestones=[3], gamma=9)),
    soft=dict(restart=dict(every=7, by_epoch=False, steps=4, momentum=0.2)),
    schedule=dict(
        restart=dict(milestones=[5, 13], by_epoch=False, steps=None, momentum=[0.3, 0.4])
    ),
    plateau=dict(restart=dict(on_plateau=dict(metric='score', rule='less', momentum_add=0.05))),
    uniform=dict(ema_type='mmema.RestartableUniformAverage', restart=dict(milestones=[2, 5])),
    threshold=dict(ema_type='mmema.RestartableThresholdEMA', factor=4),
    power=dict(ema_type='mmema.RestartablePowerFunctionEMA', sigma_rel=0.1),
    annealing=dict(ema_type='mmema.RestartableAnnealingEMA', restart=dict(milestones=[4])),
    constant=dict(ema_type='mmema.RestartableConstantEMA', restart=dict(milestones=[1, 4])),
)


def also_of(runner):
    return ema_hook_of(runner).also


def alone(name, base=OURS, also=ALSO):
    """Return the hooks of a run whose main average has the config of one in ``also``."""
    given = dict(also[name])
    restart = given.pop('restart', None)
    ours = {**base, **given}
    if 'ema_type' in given:
        cls, own = config.class_of(given['ema_type']), ('type', 'ema_type', 'begin_iter')
        ours = {k: v for k, v in ours.items() if k in own or config.takes(cls, k)}
    return ours, [] if restart is None else [dict(type='mmema.EMARestartHook', **restart)]


@pytest.mark.parametrize(
    'settings',
    [
        dict(),
        dict(ema=dict(OURS, update_buffers=True, begin_iter=6)),
        dict(optim_wrapper=dict(accumulative_counts=3, optimizer=dict(type='SGD', lr=0.05))),
        dict(ema=dict(OURS, interval=2, begin_epoch=2), iters=24, val_interval=4),
    ],
    ids=['plain', 'buffers', 'accumulation', 'by_iteration'],
)
def test_each_equals_a_run_of_its_own(tmp_path, settings):
    settings = {'script': None, **settings}
    base = settings.pop('ema', OURS)
    also = ALSO
    if 'iters' in settings:
        base = dict({k: v for k, v in base.items() if k != 'begin_epoch'}, begin_iter=5)
        also = {}
        for name, given in ALSO.items():
            restart = dict(given.get('restart', {}))
            if restart.get('by_epoch', True) and 'milestones' in restart:
                milestones = [4 * at for at in restart['milestones']]
                given = dict(given, restart=dict(restart, milestones=milestones, by_epoch=False))
            also[name] = given
    together = make_runner(tmp_path / 'all', ema=dict(base, also=also), val_cfg=ALL, **settings)
    together.train()
    for name in also:
        ours, hooks = alone(name, base, also)
        own = make_runner(tmp_path / name, *hooks, ema=ours, **settings)
        own.train()
        expected = ema_hook_of(own).ema_model.state_dict()
        assert_same(expected, also_of(together)[name].state_dict())
    plain = make_runner(tmp_path / 'plain', ema=base, **settings)
    plain.train()
    expected, found = state_of(plain), state_of(together)
    assert_same(expected, {key: found[key] for key in expected})
    if 'hard' in also and 'optim_wrapper' not in settings:
        assert also_of(together)['hard'].restarts == 1
        assert also_of(together)['plateau'].restarts >= 1


# --- resume ---------------------------------------------------------------------------------------


PLACES = [
    f'{when}_{what}'
    for when in ('before', 'after')
    for what in ('train_iter', 'val_epoch', 'train_epoch')
]


@pytest.mark.parametrize('seed', range(6))
def test_crashed_and_resumed_it_ends_with_the_same_bits(tmp_path, seed):
    chance = random.Random(seed)
    settings = dict(
        ema=dict(OURS, update_buffers=chance.random() < 0.5, also=ALSO),
        val_cfg=ALL,
        val_interval=chance.choice([1, 2]),
        checkpoint=dict(interval=chance.choice([1, 2]), save_best=['score', 'short/score']),
    )
    # A restart hook of this kind catches up on validations, too, so half of the runs have none.
    best = dict(type='mmema.EMARestartHook', milestones=[3], source='best')
    hooks = [best] if seed % 2 else []
    whole = make_runner(tmp_path / 'whole', *hooks, **settings)
    whole.train()
    for number in range(2):
        crash = Crash(chance.randint(5, 23), chance.choice(PLACES))
        cut = make_runner(tmp_path / 'cut', *hooks, crash, resume=number > 0, **settings)
        with contextlib.suppress(KeyboardInterrupt):
            cut.train()
    resumed = make_runner(tmp_path / 'cut', *hooks, resume=True, **settings)
    resumed.train()
    assert_same(state_of(whole), state_of(resumed))
    restarts = {name: getattr(ema, 'restarts', 0) for name, ema in also_of(resumed).items()}
    assert restarts['hard'] == 1 and restarts['soft'] == 3 and restarts['uniform'] == 2


@SINCE_TORCH_2_6
def test_the_checkpoint(tmp_path):
    runner = make_runner(tmp_path, epochs=2, ema=dict(OURS, also=ALSO), val_cfg=ALL)
    runner.train()
    checkpoint = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    assert list(checkpoint['ema_also']) == list(ALSO)
    for name, ema in also_of(runner).items():
        saved = checkpoint['ema_also'][name]
        assert set(saved) == {'state_dict', 'restart'}
        assert_same(dict(saved['state_dict']), ema.state_dict())
        assert (saved['restart'] is None) == ('restart' not in ALSO[name])
    assert checkpoint['ema_also']['constant']['restart']['done'] == ['epoch 1']


@SINCE_TORCH_2_6
def test_a_plateau_is_one_of_the_own_metrics(tmp_path):
    keep = Keep()
    also = dict(long=dict(momentum=0.01, restart=dict(on_plateau=dict(metric='score'))))
    make_runner(tmp_path, keep, epochs=1, ema=dict(OURS, also=also), val_cfg=ALL).train()
    best = torch.load(next(tmp_path.glob('best_*')), weights_only=True)
    seen = best['ema_also']['long']['restart']['plateau']['best']
    assert seen == keep.metrics[0]['long/score'] != keep.metrics[0]['score']


def clones(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_averages_that_the_checkpoint_lacks_or_has_in_addition(tmp_path):
    first = dict(OURS, also=dict(kept=dict(momentum=0.3), gone=dict(momentum=0.4)))
    whole = make_runner(tmp_path, epochs=3, ema=first)
    whole.train()

    class Begin(Hook):
        source = None

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if self.source is None:
                self.source, self.new = clones(runner.model), clones(also_of(runner)['new'].module)
                self.steps = {name: int(ema.steps) for name, ema in also_of(runner).items()}

    begin = Begin()
    second = dict(OURS, also=dict(kept=dict(momentum=0.3), new=dict(momentum=0.2)))
    file = tmp_path / 'epoch_2.pth'
    settings = dict(epochs=3, ema=second, resume=True, load_from=str(file))
    runner = make_runner(tmp_path / 'rest', begin, **settings)
    runner.train()
    assert begin.steps == {'kept': 8, 'new': 0}
    assert_same(begin.source, begin.new)
    assert int(also_of(runner)['new'].steps) == 4
    assert f"{file} has no average 'new': it begins as a copy of the weights" in log_of(runner)
    lacking = f"{file} has averages that the config lacks; they are dropped: 'gone'"
    assert lacking in log_of(runner)
    assert_same(also_of(whole)['kept'].state_dict(), also_of(runner)['kept'].state_dict())


@SINCE_TORCH_2_6
@pytest.mark.parametrize(
    'change, message',
    [
        (lambda state: state.pop('module.norm.weight'), "lacks 'module.norm.weight'"),
        (lambda state: state.update({'module.norm.weight': torch.ones(4)}), 'has other shapes'),
        (
            lambda state: state.update(schedule=torch.tensor([*b'constant'], dtype=torch.uint8)),
            "the state has 'constant'",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_name(tmp_path, change, message):
    ours = dict(OURS, also=dict(short=dict(momentum=0.3)))
    make_runner(tmp_path, epochs=1, ema=ours).train()
    file = tmp_path / 'epoch_1.pth'
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint['ema_also']['short']['state_dict'])
    torch.save(checkpoint, file)
    with pytest.raises(RunError, match=rf"also\['short'\]: .*{re.escape(message)}"):
        make_runner(tmp_path, epochs=2, ema=ours, resume=True).train()


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, error, message',
    [
        (dict(also=3), TypeError, 'also must be a dict of averages by name, got 3'),
        (dict(also={'a b': {}}), ValueError, "must be an identifier, .* got 'a b'"),
        (dict(also=dict(raw={})), ValueError, "none of .*'raw'.*, got 'raw'"),
        (
            dict(also=dict(short=3)),
            TypeError,
            r"also\['short'\] must be a dict of arguments, got 3",
        ),
        (
            dict(also=dict(short=dict(momentun=0.1))),
            TypeError,
            r"also\['short'\]: .*got 'momentun'",
        ),
        (
            dict(also=dict(short=dict(main=3))),
            TypeError,
            r"also\['short'\]: EMAHook passes its other .*, got 'main'",
        ),
        (dict(also=dict(short={3: 4})), TypeError, r"also\['short'\]: .*, got 3$"),
        (dict(also=dict(short=dict(momentum=2))), ValueError, r"also\['short'\]: momentum .*got 2"),
        (dict(also=dict(short=dict(begin_iter=2))), TypeError, r"'short'.*got 'begin_iter'"),
        (
            dict(also=dict(short=dict(ema_type='Nothing'))),
            ValueError,
            "name an averaged .*'Nothing'",
        ),
        (dict(also=dict(short=dict(restart={}))), ValueError, r"'short'.*must have a trigger"),
        (
            dict(also=dict(short=dict(restart=3))),
            TypeError,
            r"'short'.*restart must be a dict.*got 3",
        ),
        (
            dict(also=dict(short=dict(restart=dict(milestone=[3])))),
            TypeError,
            r"also\['short'\]: restart takes \(milestones, .*got 'milestone'",
        ),
        (
            dict(also=dict(short=dict(restart=dict(every=2, source='ema')))),
            ValueError,
            r"also\['short'\]: .*must not change the training",
        ),
        (
            dict(also=dict(a=dict(restart=dict(on_plateau=dict(metric='x', source='best'))))),
            ValueError,
            r"also\['a'\]: .*must not change the training",
        ),
        (
            dict(also=dict(a=dict(ema_type='mmema.ExpMomentumEMA', restart=dict(every=2)))),
            ValueError,
            r"also\['a'\]: restart needs a restartable average, got ExpMomentumEMA",
        ),
        (dict(horizon='2 weeks'), ValueError, "horizon must be such as .*got '2 weeks'"),
        (dict(horizon=500), ValueError, 'horizon must be such as .*got 500'),
        (dict(horizon=1.5), ValueError, 'horizon must be such as .*got 1.5'),
        (dict(horizon='0 epochs'), ValueError, "horizon must be such as .*got '0 epochs'"),
        (dict(horizon=0.1, momentum=0.1), ValueError, 'in place of momentum, .* got both'),
        (
            dict(horizon=0.1, ema_type='mmema.RestartableUniformAverage'),
            ValueError,
            'RestartableUniformAverage has no momentum',
        ),
        (dict(base_batch_size=0), ValueError, 'base_batch_size must be at least 1, got 0'),
        (dict(base_batch_size=1.5), TypeError, 'base_batch_size must be an integer, got 1.5'),
    ],
)
def test_bad_arguments_are_refused_by_the_constructor(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        mmema.EMAHook(**arguments)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'restart, message',
    [
        (dict(follow='PipelineSwitchHook'), "follow='PipelineSwitchHook' must name a hook"),
        (dict(on_plateau=dict(metric='score')), r'on_plateau watches .* val_cfg=dict'),
        (dict(every=2, momentum=0.1), 'a restart can only change .*got momentum'),
    ],
)
def test_a_restart_that_does_not_fit_the_run_is_refused_by_name(tmp_path, restart, message):
    also = dict(mean=dict(ema_type='mmema.RestartableUniformAverage', restart=restart))
    with pytest.raises(RunError, match=rf"also\['mean'\]: .*{message}"):
        make_runner(tmp_path, ema=dict(OURS, also=also)).train()


@pytest.mark.parametrize('second', ['EMAHook', 'mmema.EMAHook'])
def test_two_hooks_are_refused_and_also_is_named(tmp_path, second):
    runner = make_runner(tmp_path, dict(EMA, type=second), ema=OURS)
    with pytest.raises(RunError, match='must have one EMAHook, got 2.*also=dict') as caught:
        runner.train()
    assert '\n' not in str(caught.value)


def test_what_is_not_given_is_the_main_ones(tmp_path):
    also = dict(same={}, mean=dict(ema_type='mmema.RestartableUniformAverage'))
    ours = dict(OURS, momentum=0.3, gamma=7, update_buffers=True, exclude=['norm.*'], also=also)
    runner = make_runner(tmp_path, epochs=1, ema=ours)
    runner.train()
    averages = also_of(runner)
    assert (averages['same'].momentum, averages['same'].gamma) == (0.3, 7)
    for ema in averages.values():
        assert ema.update_buffers and ema.exclude == ('norm.*',)
    assert_same(ema_hook_of(runner).ema_model.state_dict(), averages['same'].state_dict())


# --- evaluation -----------------------------------------------------------------------------------


class Keep(Hook):
    priority = 'LOWEST'

    def __init__(self):
        self.metrics, self.scores = [], []

    def after_val_epoch(self, runner, metrics=None):
        self.metrics.append(dict(metrics))
        states = {n: e.module.state_dict() for n, e in also_of(runner).items()}
        states.update(raw=runner.model.state_dict())
        self.scores.append({n: predicted(state, runner) for n, state in states.items()})


def test_metrics_table_and_best_checkpoints_of_all(tmp_path):
    keep = Keep()
    also = dict(short=dict(momentum=0.5), long=dict(momentum=0.001))
    runner = make_runner(
        tmp_path,
        dict(type='mmema.EMAMonitorHook'),
        keep,
        epochs=4,
        ema=dict(OURS, also=also),
        val_cfg=ALL,
        checkpoint=dict(save_best=['score', 'short/score'], rule=['greater', 'greater']),
    )
    runner.train()
    for metrics, scores in zip(keep.metrics, keep.scores):
        assert list(metrics) == ['score', 'raw/score', 'short/score', 'long/score']
        for name, score in scores.items():
            assert metrics[f'{name}/score'] == pytest.approx(score, abs=1e-5)
    assert len({round(score, 5) for score in keep.scores[-1].values()}) == 3
    rows = {}
    for line in log_of(runner).split('score of all weights\n')[1].splitlines()[:5]:
        name, *cells = line.split()
        rows[name] = cells
    assert rows.pop('weights') == ['best', 'epoch', 'last']
    assert list(rows) == ['ema', 'raw', 'short', 'long']
    for name, (best, epoch, last) in rows.items():
        key = 'score' if name == 'ema' else f'{name}/score'
        values = [metrics[key] for metrics in keep.metrics]
        assert float(best) == pytest.approx(max(values), abs=1e-4)
        assert float(last) == pytest.approx(values[-1], abs=1e-4)
        assert values[int(epoch) - 1] == max(values)
    assert [f.name for f in tmp_path.glob('best_short*')] and [*tmp_path.glob('best_score*')]
    scalars = next(tmp_path.rglob('scalars.json')).read_text()
    for name in ('ema_distance', 'ema_short_distance', 'ema_long_momentum', 'short/score'):
        assert f'"{name}"' in scalars
    assert '"ema_long_steps": 16' in scalars


def test_some_of_the_weights(tmp_path):
    keep = Keep()
    also = dict(short=dict(momentum=0.5), long=dict(momentum=0.001))
    val_cfg = dict(ALL, weights=['long'])
    make_runner(tmp_path, keep, epochs=1, ema=dict(OURS, also=also), val_cfg=val_cfg).train()
    assert list(keep.metrics[0]) == ['score', 'long/score']
    val_cfg = dict(ALL, weights=['lang'])
    with pytest.raises(ValueError, match=r"out of \['raw', 'short', 'long'\], got \['lang'\]"):
        make_runner(tmp_path, ema=dict(OURS, also=also), val_cfg=val_cfg).train()


def test_the_log_tells_when_the_raw_weights_are_ahead(tmp_path):
    slow = dict(OURS, ema_type='mmema.RestartableConstantEMA', momentum=0.001)
    slow.pop('gamma')
    runner = make_runner(tmp_path, epochs=5, ema=slow, val_cfg=ALL)
    runner.train()
    lines = [line for line in log_of(runner).splitlines() if 'worse than the raw' in line]
    assert len(lines) == 1 and re.search(r'score: (\S+ against \S+(, |\. )){3}', lines[0])


@SINCE_TORCH_2_6
@pytest.mark.parametrize('update_buffers', [False, True])
def test_recalibrated_statistics(tmp_path, update_buffers):
    also = dict(short=dict(momentum=0.5), long=dict(momentum=0.001))
    runner = make_runner(
        tmp_path,
        dict(type='mmema.EMARecalibrateHook', batches=100),
        epochs=2,
        ema=dict(OURS, update_buffers=update_buffers, also=also),
        val_cfg=dict(ALL, weights=['raw', 'short']),
    )
    runner.train()
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=True)
    # BatchNorm is the first layer: its mean is that of the data, whatever the weights.
    x = runner.train_dataloader.dataset.x
    short = saved['ema_also']['short']['state_dict']['module.norm.running_mean']
    torch.testing.assert_close(short, x.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        saved['state_dict']['norm.running_mean'], x.mean(0), atol=1e-5, rtol=0
    )
    long = saved['ema_also']['long']['state_dict']['module.norm.running_mean']
    assert not torch.allclose(long, x.mean(0), atol=1e-3)
    assert "BatchNorm layers of also['short'] on 4" in log_of(runner)


def test_restarts_are_logged_with_the_name(tmp_path):
    also = dict(short=dict(momentum=0.5, restart=dict(milestones=[1], gamma=9)))
    runner = make_runner(tmp_path, epochs=2, ema=dict(OURS, also=also))
    runner.train()
    assert (
        "EMA restart 1 of 'short' at epoch 1, iter 4 (due: epoch 1): steps 4 -> 0, momentum 0.5 -> "
        '0.5, gamma 5 -> 9' in log_of(runner)
    )
    assert runner.message_hub.get_scalar('train/ema_short_set_gamma').current() == 9


# --- cost -----------------------------------------------------------------------------------------


def test_averages_in_main_memory_are_staged_once(tmp_path, monkeypatch):
    ours = dict(OURS, device='cpu')
    also = {name: ALSO[name] for name in ('short', 'hard', 'soft', 'uniform')}
    whole = make_runner(tmp_path / 'near', ema=dict(ours, also=also))
    whole.train()
    monkeypatch.setattr(follower, 'is_far', lambda *models: True)  # as with a GPU
    far = make_runner(tmp_path / 'far', ema=dict(ours, also=also))
    far.train()
    averages = averages_of(ema_hook_of(far)).values()
    assert len({id(ema._follower.view) for ema in averages}) == 1
    assert_same(state_of(whole), state_of(far))
