"""EMAHook with ``horizon='auto'``: a ladder of averages, and the choice at each validation.

The oracle is a float64 twin that has all weights of a run recorded, and a choice worked out by hand
from scores that a script gives to the weights which are evaluated.
"""

import contextlib
import math
import random

import pytest
import torch
from marks import SINCE_TORCH_2_6
from mmengine.hooks import Hook
from mmengine.runner import ValLoop
from mmengine.structures import BaseDataElement
from runs import (
    Crash,
    LineModel,
    assert_same,
    log_of,
    make_runner,
    points,
    predicted,
    state_of,
)

import mmema
from mmema.checkpoints.export import export
from mmema.checkpoints.report import inspect
from mmema.messages import RunError
from mmema.run import ema_hook_of
from mmema.run.metrics import prefixes_in

OWN = ['2 updates', '3 updates', '5 updates', '7 updates']
LADDER = dict(type='mmema.EMAHook', horizon=OWN)
NAMES = ['raw', 'h2_updates', 'h3_updates', 'h5_updates', 'h7_updates']
AUTO = dict(type='mmema.EMAHook', horizon='auto')


def ladder_of(runner):
    return ema_hook_of(runner).ladder


def shown(runner):
    """The name of the weights that the model has now; a swap shares their memory."""
    own = runner.model.layers[0].weight.data_ptr()
    for name, rung in ema_hook_of(runner).rungs.items():
        if rung.module.layers[0].weight.data_ptr() == own:
            return name
    return 'raw'


class Script(Hook):
    """Scores by the time of the run and the weights in the model; it keeps what was asked."""

    def __init__(self, *tables):
        self.tables = tables
        self.asked = []

    def before_run(self, runner):
        self.runner = runner

    def __getitem__(self, now):
        name = shown(self.runner)
        self.asked.append((now, NAMES.index(name)))
        return self.tables[now - 1][NAMES.index(name)]


class Keep(Hook):
    """Keeps what hooks see after a validation, and the weights that are chosen then."""

    priority = 'LOWEST'

    def __init__(self):
        self.metrics, self.chosen, self.weights = [], [], []

    def after_val_epoch(self, runner, metrics=None):
        hook = ema_hook_of(runner)
        self.metrics.append(dict(metrics))
        self.chosen.append(hook.chosen)
        model = runner.model if hook.chosen == 'raw' else hook.rungs[hook.chosen].module
        self.weights.append({k: t.clone() for k, t in model.state_dict().items()})


# --- the averages ---------------------------------------------------------------------------------


class Record(Hook):
    """Keeps the weights after each iteration, in float64."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.weights = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        state = runner.model.state_dict().items()
        self.weights.append({k: t.clone().double() for k, t in state})


def twin(weights, horizon):
    """The average of recorded weights, blended at every 1/100 of the horizon; integers copied."""
    interval = max(1, int(horizon) // 100)
    average = dict(weights[0])
    for steps, now in enumerate(weights[1:], 1):
        m = max(interval / horizon, 2 / (2 + steps / interval))
        for name, tensor in now.items():
            if name in ('calls', 'norm.num_batches_tracked'):
                average[name] = tensor
            elif steps % interval == 0:
                average[name] = (1 - m) * average[name] + m * tensor
    return average


@pytest.mark.parametrize('accumulation', [1, 3])
def test_each_rung_is_the_average_of_a_float64_twin(tmp_path, accumulation):
    record, updates = Record(), 432 // accumulation
    wrapper = dict(accumulative_counts=accumulation, optimizer=dict(type='SGD', lr=0.02))
    horizon = [0.01, 0.5, 0.9]
    runner = make_runner(
        tmp_path,
        record,
        iters=432,
        val_interval=100,
        checkpoint=dict(interval=100),
        optim_wrapper=wrapper,
        ema=dict(type='mmema.EMAHook', horizon=horizon),
    )
    runner.train()
    weights = record.weights[accumulation - 1 :: accumulation]
    assert len(weights) == updates
    intervals = [rung.interval for rung in ema_hook_of(runner).rungs.values()]
    assert intervals == ([1, 2, 3] if accumulation == 1 else [1, 1, 1])
    for share, rung in zip(horizon, ema_hook_of(runner).rungs.values()):
        for name, tensor in rung.module.state_dict().items():
            expected = twin(weights, share * updates)[name]
            torch.testing.assert_close(tensor.double(), expected, rtol=2e-6, atol=2e-6, msg=name)


def test_a_rung_equals_an_average_of_also_bit_for_bit(tmp_path):
    also = dict(
        near=dict(ema_type='mmema.RestartableAnnealingEMA', momentum=3 / 320, interval=3, gamma=6),
        auto=dict(
            ema_type='mmema.RestartableAnnealingEMA', horizon=0.8, interval='auto', gamma=6.0
        ),
    )
    also = {name: dict(own, update_buffers=False) for name, own in also.items()}
    settings = dict(iters=400, val_interval=90, checkpoint=dict(interval=70))
    monitor = dict(type='mmema.EMAMonitorHook', interval=7)
    ema = dict(type='mmema.EMAHook', horizon=[0.01, 0.8], update_buffers=False, also=also)
    runner = make_runner(tmp_path, monitor, ema=ema, **settings)
    runner.train()
    hook = ema_hook_of(runner)
    expected = dict(hook.also['near'].state_dict())
    for name in ('h80', 'auto'):
        assert hook.also[name].interval == 3
        found = dict(hook.also[name].state_dict())
        assert_same(expected, found)


@pytest.mark.parametrize('evaluate', ['neighbours', 'all'])
def test_the_training_is_the_same_bit_for_bit(tmp_path, evaluate):
    alone = make_runner(tmp_path / 'alone', ema=dict(type='EMAHook', momentum=0.1))
    ladder = make_runner(tmp_path / 'ladder', ema=dict(LADDER, evaluate=evaluate))
    for runner in (alone, ladder):
        for hook in runner.hooks:
            if type(hook).__name__ == 'Clock':
                hook.after_train_iter = lambda *args, **kwargs: None
        runner.train()
    kept = ('raw.', 'optimizer.')
    first, second = (
        {k: v for k, v in state_of(runner).items() if k.startswith(kept)}
        for runner in (alone, ladder)
    )
    assert_same(first, second)


def test_between_its_blends_a_rung_costs_nothing(tmp_path, monkeypatch):
    from mmema.update.follower import Follower

    blends, copies = [], []
    plain = Follower.update

    def update(self, momentum):
        (copies if momentum is None else blends).append(momentum)
        plain(self, momentum)

    monkeypatch.setattr(Follower, 'update', update)
    runner = make_runner(
        tmp_path,
        iters=1000,
        val_interval=1000,
        checkpoint=dict(interval=1000),
        ema=dict(type='mmema.EMAHook', horizon=['10 updates', '250 updates', '500 updates']),
    )
    runner.train()
    # Every update, every second and every fifth; copies when all are read: to be saved.
    assert len(blends) == 1000 + 500 + 200
    assert len(copies) == 2


def test_a_copy_that_waits_comes_before_the_model_has_other_weights(tmp_path):
    class Look(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            hook = ema_hook_of(runner)
            long = hook.rungs['h80']
            if runner.iter == 12:
                assert int(long.steps) % long.interval  # the last update has not blended
                with mmema.averaged_weights(runner.model, hook.also['other']):
                    runner.model.norm.running_mean.fill_(7)
                assert torch.equal(long.module.norm.running_mean, runner.model.norm.running_mean)
                self.seen = True

    look = Look()
    ema = dict(
        type='mmema.EMAHook',
        horizon=[0.01, 0.8],
        update_buffers=False,
        also=dict(other=dict(momentum=0.01)),
    )
    make_runner(tmp_path, look, iters=600, val_interval=600, ema=ema).train()
    assert look.seen


# --- the choice -----------------------------------------------------------------------------------

NAN = math.nan
# By validation: scores of raw, h2, h3, h5, h7, and the choice that follows, worked out by hand.
MOVES = [
    ((0.9, 0.4, 0.5, 0.6, 0.9), 'h5_updates', [2, 1, 3]),
    ((0.9, 0.9, 0.5, 0.5, 0.5), 'h5_updates', [3, 2, 4]),  # a tie
    ((0.9, 0.9, None, NAN, 0.1), 'h7_updates', [3, 2, 4]),
    ((0.9, 0.9, 0.9, 0.2, None), 'h5_updates', [4, 3]),
    ((0.9, 0.9, 0.4, 0.3, 0.35), 'h3_updates', [3, 2, 4]),
    ((0.9, 0.6, 0.5, 0.1, 0.9), 'h2_updates', [2, 1, 3]),
    ((0.7, 0.3, 0.1, 0.9, 0.9), 'raw', [1, 0, 2]),
    ((0.1, 0.2, 0.3, 0.25, 0.9), 'h3_updates', [0, 1, 2, 3]),  # the last one climbs on
]


def moving_run(folder, *hooks, tables=None, **settings):
    script, keep = Script(*(tables or [table for table, _, _ in MOVES])), Keep()
    settings = dict(dict(ema=LADDER, epochs=len(MOVES), script=script), **settings)
    runner = make_runner(folder, script, keep, *hooks, **settings)
    return runner, script, keep


def test_it_climbs(tmp_path):
    runner, script, keep = moving_run(tmp_path)
    runner.train()
    asked = [(now, place) for now, (_, _, places) in enumerate(MOVES, 1) for place in places]
    assert script.asked == asked
    assert keep.chosen == [chosen for _, chosen, _ in MOVES]
    for (table, chosen, places), metrics in zip(MOVES, keep.metrics):
        assert metrics.pop('score') == table[NAMES.index(chosen)]
        expected = {f'{NAMES[p]}/score': table[p] for p in sorted(places) if table[p] is not None}
        assert str(metrics) == str(expected)  # NaN is not NaN
    log = log_of(runner)
    assert 'the average of 5 updates, 5.0 updates, is ahead: 0.6 against 0.5; chosen from' in log
    assert 'the raw weights are ahead: 0.7 against 0.3; chosen from now on' in log
    validations = [point for point in points(runner) if 'ema_chosen' in point]
    for point, (table, _, places) in zip(validations, MOVES):
        # Of weights that were not looked at the log has no score, and not that of before.
        logged = {name for name in NAMES if f'{name}/score' in point}
        assert logged == {NAMES[place] for place in places if table[place] is not None}
    assert [p['ema_chosen'] for p in validations] == [NAMES.index(name) for name in keep.chosen]
    rows = [line.split() for line in log.split('the last score of each')[1].splitlines()[1:7]]
    assert rows[0] == ['weights', 'horizon', 'updates', 'score', 'at']
    assert [row[0] for row in rows[1:]] == NAMES
    assert rows[1][-2:] == ['0.1000', '8'] and rows[3][-4:] == ['0.3000', '8', '<-', 'chosen']
    assert rows[5][-2:] == ['0.3500', '5']


def test_less_can_be_better(tmp_path):
    tables = [[None if s is None else -s for s in table] for table, _, _ in MOVES]
    runner, _, keep = moving_run(tmp_path, tables=tables, checkpoint=dict(rule='less'))
    runner.train()
    assert keep.chosen == [chosen for _, chosen, _ in MOVES]


def test_all_are_evaluated_where_that_is_asked_for(tmp_path):
    runner, script, keep = moving_run(tmp_path, ema=dict(LADDER, evaluate='all'))
    runner.train()
    assert len(script.asked) == 5 * len(MOVES)
    best = [max(range(5), key=lambda p: -1 if not t[p] else t[p]) for t, _, _ in MOVES]
    assert [t[NAMES.index(n)] for (t, _, _), n in zip(MOVES, keep.chosen)] == [
        table[place] for (table, _, _), place in zip(MOVES, best)
    ]


def test_without_a_known_direction_it_stays_and_says_so_once(tmp_path):
    checkpoint = dict(save_best=None, rule=None)
    runner, script, keep = moving_run(tmp_path, checkpoint=checkpoint)
    runner.train()
    assert set(keep.chosen) == {'h3_updates'}
    assert len(script.asked) == len(MOVES)
    assert log_of(runner).count("set save_best='score' and rule='greater' or 'less'") == 1


def test_one_validation_climbs_all_the_way(tmp_path):
    table = (0.1, 0.2, 0.3, 0.4, 0.5)
    runner, script, keep = moving_run(tmp_path, tables=[table] * 9, val_interval=9)
    runner.train()
    assert script.asked == [(8, place) for place in (2, 1, 3, 4, 0)]
    assert keep.chosen == ['h7_updates']
    saved = torch.load(tmp_path / 'epoch_8.pth', weights_only=False)
    assert_same(dict(saved['state_dict']), keep.weights[0])  # it was saved before, and again


@pytest.mark.parametrize('settings', [dict(val_begin=99), dict()], ids=['never', 'none'])
def test_a_run_without_validation_says_so_and_keeps_three_per_cent(tmp_path, settings):
    runner = make_runner(tmp_path, iters=400, ema=AUTO, checkpoint=dict(save_best=None, rule=None))
    if settings:
        runner._train_loop['val_begin'] = 999
    else:
        runner._val_loop = runner._val_dataloader = runner._val_evaluator = None
    runner.train()
    assert ladder_of(runner).chosen == 'h3'
    text = 'this run has no validation, so nothing is chosen: the average of 3 % of the run (12 up'
    assert log_of(runner).count(text) == 1
    saved = torch.load(tmp_path / 'iter_400.pth', weights_only=False)
    rung = {k[7:]: t for k, t in saved['ema_also']['h3']['state_dict'].items() if 'module.' in k}
    assert_same(dict(saved['state_dict']), rung)


def test_losses_of_a_validation_are_those_of_the_winner(tmp_path):
    class Losing(LineModel):
        """Gives a loss in validations: the first weight of the model."""

        def val_step(self, data):
            loss = dict(loss=self.layers[0].weight[0, 0].detach().clone())
            return [*super().val_step(data), BaseDataElement(loss=loss)]

    if not HAS_LOSSES:
        pytest.skip('this MMEngine has no losses in validations')
    tables = [(0.0, 0.5, 0.4, 0.3, 0.2), (0.0, 0.5, 0.4, 0.3, 0.2)]
    runner, _, keep = moving_run(tmp_path, tables=tables, epochs=2, model=Losing())
    runner.train()
    assert keep.chosen == ['h2_updates', 'h2_updates']
    for metrics, weights in zip(keep.metrics, keep.weights):
        first = weights['layers.0.weight'][0, 0].item()
        assert metrics['val_loss'] == pytest.approx(first, abs=1e-7)


HAS_LOSSES = 'val_loss' in ValLoop.__init__.__code__.co_names


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', range(3))
def test_each_file_has_the_weights_that_its_score_is_of(tmp_path, seed):
    keep = Keep()
    runner = make_runner(
        tmp_path, keep, epochs=9, ema=LADDER, model=LineModel(seed), checkpoint=dict(interval=1)
    )
    runner.train()
    scores = [metrics['score'] for metrics in keep.metrics]
    best = torch.load(next(tmp_path.glob('best_*')), weights_only=False)
    epoch = scores.index(max(scores))
    assert predicted(best['state_dict'], runner) == pytest.approx(scores[epoch], abs=1e-6)
    assert_same(dict(best['state_dict']), keep.weights[epoch])
    assert len(set(keep.chosen)) > 1
    for number, weights in enumerate(keep.weights, 1):
        saved = torch.load(tmp_path / f'epoch_{number}.pth', weights_only=False)
        assert_same(dict(saved['state_dict']), weights)
        raw = {k[7:]: t for k, t in saved['ema_state_dict'].items() if k.startswith('module.')}
        if keep.chosen[number - 1] == 'raw':
            assert_same(raw, weights)


@SINCE_TORCH_2_6
def test_the_checkpoint_is_plain_and_has_the_chosen_weights_once(tmp_path):
    runner, _, _ = moving_run(tmp_path)
    runner.train()
    saved = torch.load(tmp_path / 'epoch_6.pth', weights_only=True)
    assert list(saved['ema_also']) == NAMES[1:]
    auto = saved['ema_auto']
    assert auto['chosen'] == 'h2_updates' and auto['validated'] == 6
    assert auto['horizons'] == dict(zip(NAMES[1:], OWN))
    assert auto['updates'] == dict(zip(NAMES[1:], [2, 3, 5, 7]))
    assert auto['scores']['h2_updates'] == [(1, 0.4), (6, 0.6)]
    chosen = saved['ema_also']['h2_updates']['state_dict']
    for name, tensor in saved['state_dict'].items():
        assert chosen[f'module.{name}'].data_ptr() == tensor.data_ptr()


@SINCE_TORCH_2_6
def test_the_commands_show_the_ladder(tmp_path):
    moving_run(tmp_path)[0].train()
    lines = dict(inspect(tmp_path / 'epoch_6.pth').lines())
    assert lines['ladder'].startswith('h2_updates is chosen, ')
    assert 'h2_updates 0.6 (at 6)' in lines['ladder']
    assert lines['rung h7_updates'].startswith('updates 24, schedule annealing')
    out = export(tmp_path / 'epoch_6.pth', tmp_path / 'rung.pth', weights='h7_updates')
    saved = torch.load(tmp_path / 'epoch_6.pth', weights_only=True)
    rung = saved['ema_also']['h7_updates']['state_dict']
    for name, tensor in torch.load(out, weights_only=True)['state_dict'].items():
        assert torch.equal(tensor, rung[f'module.{name}'])
    assert prefixes_in(dict(custom_hooks=[LADDER])) == {n: f'{n}/' for n in NAMES}


# --- resume ---------------------------------------------------------------------------------------


class Stop(Hook):
    """Stops a run in the middle of a validation: when it asks for the score of some weights."""

    def __init__(self, script, asked):
        self.script, self.asked, self.tables = script, asked, script.tables

    def __getitem__(self, now):
        if len(self.script.asked) == self.asked:
            raise KeyboardInterrupt
        return self.script[now]


def end_of(runner):
    state = {k: v for k, v in ladder_of(runner).state_dict().items() if k != 'measured'}
    return {**state_of(runner), **{key: str(value) for key, value in state.items()}}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    runner, _, keep = moving_run(folder)
    runner.train()
    return folder, end_of(runner), keep


@pytest.mark.parametrize('epoch', range(1, 9))
def test_resumes_after_every_validation(tmp_path, whole, epoch):
    folder, end, keep = whole
    file = str(folder / f'epoch_{epoch}.pth')
    runner, _, again = moving_run(tmp_path, resume=True, load_from=file)
    runner.train()
    assert_same(end, end_of(runner))
    assert again.chosen == keep.chosen[-len(again.chosen) :] if again.chosen else epoch == 8
    last = torch.load(tmp_path / 'epoch_8.pth', weights_only=False) if epoch < 8 else None
    if last:
        assert_same(dict(last['state_dict']), keep.weights[-1])


@pytest.mark.parametrize('asked', range(0, 25, 2))
def test_stopped_in_the_middle_of_a_validation(tmp_path, whole, asked):
    _, end, keep = whole
    runner, script, _ = moving_run(tmp_path)
    runner.val_evaluator.metrics[0].script = Stop(script, asked)
    with contextlib.suppress(KeyboardInterrupt):
        runner.train()
    assert len(script.asked) == asked
    resumed, _, _ = moving_run(tmp_path, resume=True)
    resumed.train()
    assert_same(end, end_of(resumed))
    last = torch.load(tmp_path / 'epoch_8.pth', weights_only=False)
    assert_same(dict(last['state_dict']), keep.weights[-1])


@pytest.mark.parametrize('seed', range(6))
def test_crashed_and_resumed_it_ends_with_the_same_bits(tmp_path, seed):
    chance = random.Random(seed)
    also = dict(short=dict(momentum=0.3), hard=dict(restart=dict(milestones=[3], gamma=9)))
    settings = dict(
        epochs=12,
        ema=dict(LADDER, also=also if seed % 2 else None, update_buffers=seed % 3 > 0),
        val_interval=chance.choice([1, 2]),
        checkpoint=dict(interval=chance.choice([1, 2]), max_keep_ckpts=3),
        val_cfg=dict(type='mmema.EMAValLoop') if seed == 3 else None,
    )
    hooks = [dict(type='mmema.EMARestartHook', milestones=[4], source='best')] if seed > 3 else []
    whole = make_runner(tmp_path / 'whole', *hooks, **settings)
    whole.train()
    for number in range(2):
        places = ['before_train_iter', 'after_train_iter', 'before_val_epoch', 'after_val_epoch']
        crash = Crash(chance.randint(9, 47), chance.choice(places))
        cut = make_runner(tmp_path / 'cut', *hooks, crash, resume=number > 0, **settings)
        with contextlib.suppress(KeyboardInterrupt):
            cut.train()
    resumed = make_runner(tmp_path / 'cut', *hooks, resume=True, **settings)
    resumed.train()
    assert_same(end_of(whole), end_of(resumed))


def test_another_ladder_takes_over_by_name(tmp_path):
    moving_run(tmp_path, tables=[(0.1, 0.4, 0.5, 0.6, 0.2)] * 2, epochs=2)[0].train()
    ema = dict(LADDER, horizon=['3 updates', '6 updates'])
    runner = make_runner(tmp_path, epochs=3, ema=ema, resume=True)
    runner.train()
    log = log_of(runner)
    assert "has no average 'h6_updates': it begins as a copy of the weights" in log
    assert "dropped: 'h2_updates', 'h5_updates', 'h7_updates'" in log
    assert "the chosen average 'h5_updates' of the checkpoint is not in this ladder" in log
    assert int(ema_hook_of(runner).rungs['h3_updates'].steps) == 12
    assert int(ema_hook_of(runner).rungs['h6_updates'].steps) == 4


def test_a_single_average_does_not_take_over_a_ladder(tmp_path):
    moving_run(tmp_path, epochs=2)[0].train()
    single = dict(type='mmema.EMAHook', momentum=0.1)
    with pytest.raises(RunError, match="has 'annealing' and RestartableExpMomentumEMA has 'exp'"):
        make_runner(tmp_path, epochs=3, ema=single, resume=True).train()


# --- beside other parts ---------------------------------------------------------------------------


def test_with_ema_val_loop_no_weights_are_evaluated_twice(tmp_path):
    val_cfg = dict(type='mmema.EMAValLoop', weights=['raw', 'h2_updates', 'h5_updates'])
    tables = [(0.1, 0.2, 0.3, 0.4, 0.9)] * 2
    runner, script, keep = moving_run(tmp_path, val_cfg=val_cfg, tables=tables, epochs=2)
    runner.train()
    assert [place for _, place in script.asked] == [0, 1, 3, 2, 0, 1, 3, 3, 2, 4]
    assert keep.chosen == ['h5_updates', 'h7_updates'] and keep.metrics[1]['score'] == 0.9
    runner = make_runner(
        tmp_path / 'default',
        ema=dict(LADDER, also=dict(short=dict(momentum=0.3))),
        val_cfg=dict(type='mmema.EMAValLoop'),
        epochs=2,
    )
    runner.train()
    assert runner.val_loop.weights == ['raw', 'short']


@pytest.mark.parametrize('source', ['model', 'ema', 'best'])
def test_a_restart_restarts_all_rungs(tmp_path, source):
    hook = dict(type='mmema.EMARestartHook', milestones=[3], source=source)
    runner, _, _ = moving_run(tmp_path, hook, epochs=4)
    runner.train()
    for rung in ema_hook_of(runner).rungs.values():
        assert (rung.restarts, int(rung.steps)) == (1, 4)
    assert f'EMA restart 1 of {", ".join(NAMES[1:])} at epoch 3, iter 12' in log_of(runner)


def test_a_restart_from_the_best_checkpoint_takes_all_rungs_back(tmp_path):
    seen = {}

    class Look(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 12:
                averages = ema_hook_of(runner).rungs
                for name, one in averages.items():
                    seen[name] = {k: t.clone() for k, t in one.state_dict().items()}

    hook = dict(type='mmema.EMARestartHook', milestones=[3], source='best', steps=2)
    tables = [(0.5, 0.5, 0.9, 0.5, 0.5), *[(0.1, 0.1, 0.2, 0.1, 0.1)] * 7]
    runner, _, _ = moving_run(tmp_path, hook, Look(), tables=tables, epochs=4)
    runner.train()
    best = torch.load(next(tmp_path.glob('best_before*')), weights_only=False)
    for name, state in seen.items():
        saved = best['ema_also'][name]['state_dict']
        for key, tensor in saved.items():
            if key.startswith('module.'):
                assert torch.equal(state[key], tensor), (name, key)


@pytest.mark.parametrize(
    'change', [dict(momentum=0.1), dict(gamma=3), dict(on_plateau=dict(metric='score', momentum=1))]
)
def test_a_restart_cannot_change_the_horizons(tmp_path, change):
    if 'on_plateau' in change:
        change = dict(on_plateau=dict(metric='score', momentum_add=0.1))
    hook = dict(type='mmema.EMARestartHook', **{'milestones': [2], **change})
    with pytest.raises(RunError, match='must leave the horizons as they are.*Leave') as caught:
        make_runner(tmp_path, hook, ema=LADDER).train()
    assert '\n' not in str(caught.value)


def test_recalibrated_statistics(tmp_path):
    tables = [(0.1, 0.2, 0.5, 0.3, 0.1), (0.1, 0.2, 0.3, 0.4, 0.5)]
    hook = dict(type='mmema.EMARecalibrateHook', batches=100)
    runner, _, keep = moving_run(tmp_path, hook, tables=tables, epochs=2)
    runner.train()
    assert keep.chosen[-1] == 'h7_updates'
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    # BatchNorm is the first layer: its mean is that of the data, whatever the weights.
    mean = runner.train_dataloader.dataset.x.mean(0)
    for name in NAMES[1:]:
        found = saved['ema_also'][name]['state_dict']['module.norm.running_mean']
        torch.testing.assert_close(found, mean, atol=1e-5, rtol=0)
        assert f'BatchNorm layers of the average {name!r} on 4 training' in log_of(runner)
    torch.testing.assert_close(saved['state_dict']['norm.running_mean'], mean, atol=1e-5, rtol=0)


def test_raw_weights_are_evaluated_with_their_own_statistics(tmp_path):
    keep = Keep()
    hook = dict(type='mmema.EMARecalibrateHook', batches=100, interval=1)
    ema = dict(LADDER, evaluate='all')
    runner = make_runner(tmp_path, hook, keep, epochs=9, ema=ema)
    runner.train()
    assert 'raw' in keep.chosen[:-1]
    for number in range(9):
        saved = torch.load(tmp_path / f'epoch_{number + 1}.pth', weights_only=False)
        raw = {k[7:]: t for k, t in saved['ema_state_dict'].items() if k.startswith('module.')}
        score = predicted(raw, runner)
        assert keep.metrics[number]['raw/score'] == pytest.approx(score, abs=1e-6)


def test_a_test_after_the_training_is_of_the_chosen_weights(tmp_path):
    runner, _, keep = moving_run(
        tmp_path,
        test_dataloader=dict(
            batch_size=6,
            num_workers=0,
            dataset=dict(type='Line'),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        test_cfg=dict(),
        test_evaluator=dict(type='Score'),
        epochs=2,
    )
    runner.train()
    assert keep.chosen[-1] != 'h3_updates'
    found = runner.test()['score']
    assert found == pytest.approx(predicted(keep.weights[-1], runner), abs=1e-6)


def test_in_main_memory_the_weights_are_staged_once(tmp_path, monkeypatch):
    from mmema.update import follower

    near = make_runner(tmp_path / 'near', ema=LADDER)
    near.train()
    monkeypatch.setattr(follower, 'is_far', lambda *models: True)  # as with a GPU
    far = make_runner(tmp_path / 'far', ema=dict(LADDER, device='cpu'))
    far.train()
    assert len({id(rung._follower.view) for rung in ema_hook_of(far).rungs.values()}) == 1
    assert_same(end_of(near), end_of(far))


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            dict(horizon='auto', momentum=0.1),
            "in place of momentum and gamma.*'auto'.*momentum=0.1",
        ),
        (dict(horizon='auto', gamma=9), 'in place of momentum and gamma.*gamma=9'),
        (dict(horizon=['1 epoch']), 'at least two horizons'),
        (dict(horizon=[]), 'at least two horizons'),
        (dict(horizon=['1 epoch', '1 epochs']), 'must differ'),
        (dict(horizon=['1 epoch', 'long']), 'horizon must be such as'),
        (dict(horizon='auto', evaluate='some'), 'evaluate must be one of'),
        (dict(horizon='1 epoch', evaluate='all'), "evaluate must come with horizon='auto'"),
        (dict(horizon='auto', also=dict(h3={})), "none of the ladder, got 'h3'"),
        (dict(horizon='auto', ema_type='ExponentialMovingAverage'), 'Leave ema_type out'),
        (dict(interval='auto', momentum=0.1), "interval='auto' must come with a horizon"),
    ],
)
def test_refused_by_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        mmema.EMAHook(**arguments)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'horizon, message',
    [
        (['4 updates', '24 updates'], "the run of 24, but '24 updates' is 24"),
        (['1 updates', '4 updates'], "longer than one update.*'1 updates' is 1"),
        (['1 epoch', '4 updates'], "'1 epoch' and '4 updates' are both 4 updates of this run"),
    ],
)
def test_refused_at_the_start_of_a_run(tmp_path, horizon, message):
    with pytest.raises(RunError, match=message) as caught:
        make_runner(tmp_path, ema=dict(LADDER, horizon=horizon)).train()
    assert '\n' not in str(caught.value)


def test_a_loop_of_ones_own_is_refused(tmp_path):
    from mmengine.registry import LOOPS

    @LOOPS.register_module(force=True)
    class OtherLoop(ValLoop):
        def run(self):
            return {}

    with pytest.raises(RunError, match="by MMEngine's ValLoop, got a OtherLoop"):
        make_runner(tmp_path, ema=LADDER, val_cfg=dict(type='OtherLoop')).train()


def test_rungs_too_short_for_the_run_are_left_out(tmp_path):
    runner = make_runner(tmp_path, ema=AUTO)
    runner.train()
    assert list(ema_hook_of(runner).rungs) == ['h10', 'h30']
    text = "'h0_3', 'h1', 'h3' of the ladder are left out: of 24 updates they are no more than one"
    assert text in log_of(runner)
    with pytest.raises(RunError, match='at least 4 updates, got 3'):
        make_runner(tmp_path / 'short', iters=3, val_interval=3, ema=AUTO).train()


def test_the_order_is_that_of_the_run(tmp_path):
    ema = dict(LADDER, horizon=[0.5, '3 updates', '2 epochs'])
    runner = make_runner(tmp_path, ema=ema)
    runner.train()
    assert list(ema_hook_of(runner).rungs) == ['h3_updates', 'h2_epochs', 'h50']


def test_the_stock_hook_is_told_what_to_change(tmp_path):
    stock = dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA', horizon='auto')
    with pytest.raises(TypeError, match="type='mmema.EMAHook'"):
        make_runner(tmp_path, ema=stock).train()
