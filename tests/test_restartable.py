"""The restartable averages against their originals, and docs/migration.md row by row."""

import dataclasses
import inspect
import math
import re
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.registry import MODELS
from reference import ReferenceEMA, assert_close, blended_names, tensors_of
from runs import ema_of, make_runner
from torch import nn
from toys import Toy, seeded, shake

import mmema

DOCS = Path(__file__).parent.parent / 'docs' / 'migration.md'
CLASSES = {
    'RestartableConstantEMA': {'momentum': 0.01},
    'RestartableDebiasedEMA': {'momentum': 0.01},
    'RestartableThresholdEMA': {'momentum': 0.01},
    'RestartableAnnealingEMA': {'momentum': 0.01, 'gamma': 20},
    'RestartablePowerRampEMA': {'momentum': 0.01},
    'RestartablePowerFunctionEMA': {'sigma_rel': 0.1},
    'RestartableUniformAverage': {},
}
ALL = pytest.mark.parametrize('name', CLASSES)
LIVE = pytest.mark.parametrize('name', [name for name, live in CLASSES.items() if live])


def one_weight(value=0.0):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, value)
    return model


def made(name, model=None, **changed):
    return getattr(mmema, name)(model or one_weight(), **{**CLASSES.get(name, {}), **changed})


def value_at(update):
    """Return the weight that training has at the given update, from 1."""
    return math.sin(0.01 * update) + 1


def averages(ema, updates):
    """Return the average after each of the updates 1, 2, ..."""
    model, found = one_weight(), {}
    for update in range(1, max(updates) + 1):
        nn.init.constant_(model.weight, value_at(update))
        ema.update_parameters(model)
        if update in updates:
            found[update] = ema.module.weight.item()
    return found


# --- numbers that the originals gave ---------------------------------------------------------

# The original libraries, run once in float64 on value_at(1), value_at(2), ... from initial weights
# value_at(1): timm 1.0.31, diffusers 0.42.1, torch_ema 0.3, mmengine 0.10.7; the power function is
# from the formula of the paper with numpy.roots for gamma.
ORIGINALS = [
    # timm: ModelEmaV2(decay=0.99)
    (
        ('RestartableConstantEMA', {'momentum': 0.01}),
        [1.009999833334, 1.010099821668, 1.014376965413, 1.341908821455, 1.142712437946],
    ),
    # timm: ModelEmaV3(decay=0.99, use_warmup=True, warmup_gamma=1, warmup_power=2/3)
    (
        ('RestartablePowerRampEMA', {'momentum': 0.01}),
        [1.009999833334, 1.016298703646, 1.072868942317, 1.723839093051, 1.147285417717],
    ),
    # diffusers: EMAModel(decay=0.99, use_ema_warmup=True, inv_gamma=2, power=3/4, min_decay=0.2)
    (
        (
            'RestartablePowerRampEMA',
            {'momentum': 0.01, 'gamma': 2, 'power': 3 / 4, 'max_momentum': 0.8},
        ),
        [1.009999833334, 1.017376852065, 1.079324999381, 1.739992115205, 1.154532576666],
    ),
    # diffusers: EMAModel(decay=0.99)
    (
        ('RestartableThresholdEMA', {'momentum': 0.01, 'offset': 0}),
        [1.009999833334, 1.018180696992, 1.08987184751, 1.779946348389, 1.156468490679],
    ),
    # torch_ema: ExponentialMovingAverage(decay=0.99)
    (
        ('RestartableThresholdEMA', {'momentum': 0.01}),
        [1.009999833334, 1.017498958354, 1.088875477209, 1.779264040072, 1.156381708224],
    ),
    # mmengine: MomentumAnnealingEMA(momentum=0.01, gamma=20)
    (
        ('RestartableAnnealingEMA', {'momentum': 0.01, 'gamma': 20}),
        [1.009999833334, 1.019522531771, 1.095565691458, 1.814097856357, 0.886521771963],
    ),
    # Karras et al.: sigma_rel = 0.1
    (
        ('RestartablePowerFunctionEMA', {'sigma_rel': 0.1}),
        [1.009999833334, 1.019957871137, 1.093015123436, 1.775254971743, 1.217078917949],
    ),
]


@pytest.mark.parametrize(('ours', 'expected'), ORIGINALS)
def test_averages_are_those_of_the_original(ours, expected):
    name, arguments = ours
    found = averages(made(name, **arguments), (1, 2, 10, 100, 1000))
    assert list(found.values()) == pytest.approx(expected, rel=2e-12)


# --- docs/migration.md -----------------------------------------------------------------------


def yolov5(decay, tau=2000, start=0):
    """YOLOv5's counter starts at 1; ``start`` calls do nothing (D-FINE, DEIM)."""
    return lambda k: None if k <= start else decay * (1 - math.exp(-(k - start) / tau))


def tensorflow(decay, first, factor=10):
    return lambda k: min(decay, (1 + k - 1 + first) / (factor + k - 1 + first))


def crowson(decay, inv_gamma=1, power=2 / 3, min_decay=0.0, after=0):
    def decay_of(k):
        step = max(0, k - after - 1)
        if step == 0:
            return 0.0
        return max(min(1 - (1 + step / inv_gamma) ** -power, decay), min_decay)

    return decay_of


def torchvision(decay, steps, batch, epochs, processes):
    alpha = min(1.0, (1 - decay) * processes * batch * steps / epochs)
    iterations = 20 * steps  # an epoch's
    return lambda k: (0.0 if k == 1 else 1 - alpha) if (k - 1) % iterations % steps == 0 else None


def edm2(exponent):
    return lambda k: (1 - 1 / k) ** (exponent + 1)


# row of the table -> the original's decay at its k-th call (None: it does nothing there)
DECAYS = {
    ('YOLOv5', 'decay=0.9999, tau=2000'): yolov5(0.9999),
    ('YOLOX', 'decay=0.9998'): yolov5(0.9998),
    ('RT-DETR', 'decay=0.9999, warmups=2000'): yolov5(0.9999),
    ('D-FINE', 'decay=0.9999, warmups=1000, start=0'): yolov5(0.9999, 1000),
    ('DEIM', 'decay=0.9999, warmups=1000, start=500'): yolov5(0.9999, 1000, 500),
    ('PaddleDetection', "ema_decay=0.9998, ema_decay_type='exponential'"): yolov5(0.9998),
    ('PaddleDetection', "ema_decay=0.9998, ema_decay_type='threshold'"): tensorflow(0.9998, 0),
    ('PaddleDetection', "ema_decay=0.9998, ema_decay_type='normal'"): lambda k: 0.9998,
    ('timm V1, V2, V3', 'decay=0.9998'): lambda k: 0.9998,
    (
        'timm V3',
        'decay=0.9999, use_warmup=True, warmup_gamma=1, warmup_power=2/3',
    ): crowson(0.9999),
    (
        'torchvision',
        '--model-ema-decay 0.99998 --model-ema-steps 32 --batch-size 128 --epochs 600',
    ): torchvision(0.99998, 32, 128, 600, 8),
    ('TensorFlow', 'decay=0.9999'): lambda k: 0.9999,
    ('TensorFlow', 'decay=0.9999, num_updates=step'): tensorflow(0.9999, 0),
    ('pytorch_ema', 'decay=0.995, use_num_updates=True'): tensorflow(0.995, 1),
    ('D2Go', 'DECAY 0.999'): lambda k: 0.999,
    ('D2Go', 'DECAY 0.9998, DECAY_WARM_UP_FACTOR 100'): tensorflow(0.9998, 1, 100),
    ('diffusers', 'decay=0.9999'): lambda k: tensorflow(0.9999, 0)(k) if k > 1 else 0.0,
    (
        'diffusers',
        'decay=0.9999, use_ema_warmup=True, inv_gamma=2, power=3/4, min_decay=0.2',
    ): crowson(0.9999, 2, 3 / 4, 0.2),
    ('diffusers', 'decay=0.9999, use_ema_warmup=True, update_after_step=100'): crowson(
        0.9999, after=100
    ),
    ('EDM', 'ema_halflife_kimg=500'): lambda k: 0.5 ** (512 / 500_000),
    ('EDM2', 'std=0.10'): edm2(6.937203937601809),  # numpy.roots of its cubic
    ('MMEngine', 'MomentumAnnealingEMA, momentum=0.0002, gamma=100'): 'mmengine',
    ('MMEngine', 'ExponentialMovingAverage, momentum=0.0002'): 'mmengine',
    ('torch', 'AveragedModel(model)'): lambda k: 1 - 1 / k,
    ('MMEngine', 'StochasticWeightAverage'): 'mmengine',
    ('MMYOLO, MMDetection', 'ExpMomentumEMA, momentum=0.0002, gamma=2000'): yolov5(0.9998),
}


def rows_of_the_table():
    rows = {}
    for line in DOCS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split('|')]
        if line.startswith('|') and len(cells) == 3 and 'ema_type=' in cells[2]:
            settings = re.search('`([^`]*)`', cells[1]).group(1)
            rows[cells[0], settings] = cells[2].strip('`')
    return rows


ROWS = rows_of_the_table()


class Original:
    """The original's loop: blend with its decay at every call."""

    def __init__(self, decay_of, start):
        self.decay_of, self.average, self.calls, self.share_of_start = decay_of, start, 0, 1.0

    def update(self, value):
        self.calls += 1
        decay = self.decay_of(self.calls)
        if decay is not None:
            self.average = decay * self.average + (1 - decay) * value
            self.share_of_start *= decay


def mmengine_decay(settings):
    """MMEngine's own class is at hand, so its formula is not written again."""
    name, *arguments = settings.split(', ')
    ema = MODELS.get(name)(one_weight(), **{k: float(v) for k, v in map(pair, arguments)})

    def decay_of(k):
        average, ema.steps = torch.zeros(1, dtype=torch.float64), torch.tensor(k - 1)
        ema.avg_func(average, torch.ones(1, dtype=torch.float64), ema.steps)
        return 1 - average.item() if k > 1 else 0.0

    return decay_of


def pair(argument):
    return argument.split('=')


def test_the_table_and_the_originals_are_the_same_rows():
    assert set(ROWS) == set(DECAYS)


@pytest.mark.parametrize('row', DECAYS, ids=' '.join)
def test_row_of_the_table_gives_the_originals_average(row):
    hook = EMAHook(**eval(f'dict({ROWS[row]})'))
    decay_of = mmengine_decay(row[1]) if DECAYS[row] == 'mmengine' else DECAYS[row]
    start = 0.0 if row[0] == 'PaddleDetection' else -7.0
    original = Original(decay_of, start)
    model = one_weight(start)
    hook.before_run(runner_at(0, model))
    first = None
    for call in range(1, 3001):
        nn.init.constant_(model.weight, value_at(call))
        hook.after_train_iter(runner_at(call - 1, model), call - 1)
        original.update(value_at(call))
        if first is None and original.share_of_start != 1.0:
            first = value_at(call)  # ours copies at the call at which theirs first blends
        if call in (2, 3, 50, 600, 2999, 3000) and first is not None:
            ours = hook.ema_model.module.weight.item()
            if 'normal' in row[1]:  # they divide the start away when they read the average
                read = original.average / (1 - original.share_of_start)
                assert read == pytest.approx(ours, rel=1e-9), call
            else:  # they start elsewhere, and differ by exactly the share that is left of it
                expected = ours + original.share_of_start * (start - first)
                assert original.average == pytest.approx(expected, abs=1e-9), call
    assert first is not None


def runner_at(iteration, model):
    """Return all that MMEngine's EMAHook reads of a Runner."""
    return SimpleNamespace(model=model, iter=iteration, epoch=0)


def test_paddles_threshold_type_overshoots_by_what_the_page_says():
    decay_of = tensorflow(0.9998, 0)
    overshoot = [1 / (1 - decay_of(k) ** k) - 1 for k in range(1000, 45_000, 1000)]
    assert max(overshoot) == pytest.approx(1.2e-4, rel=0.1)  # about e^-9


def test_every_class_is_on_the_page():
    text = DOCS.read_text()
    assert all(name in text for name in (*CLASSES, 'RestartableExpMomentumEMA'))


# --- what every restartable average must do --------------------------------------------------


@ALL
@pytest.mark.parametrize('interval', [1, 3])
@pytest.mark.parametrize('update_buffers', [False, True])
def test_random_weights_and_restarts_follow_the_reference(name, interval, update_buffers):
    class Reference(ReferenceEMA):
        def update(self, tensors):
            for key, tensor in tensors.items():
                tensor = tensor.detach().double() if tensor.is_floating_point() else tensor.clone()
                if self.steps == 0 or key not in self.blended:
                    self.average[key] = tensor
                elif self.steps % interval == 0:
                    m = slow_momentum(name, self.steps, interval)
                    self.average[key] = (1 - m) * self.average[key] + m * tensor
            self.steps += 1

    model, random = Toy(), seeded(1)
    ema = made(name, model, interval=interval, update_buffers=update_buffers)
    slow = Reference(tensors_of(model), blended_names(model, update_buffers), None, None, interval)
    for update in range(60):
        if update == 20:
            ema.restart()
            slow.restart()
        if update == 40:
            ema.restart(steps=5)
            slow.restart(steps=5)
        shake(model, random)
        ema.update_parameters(model)
        slow.update(tensors_of(model))
        assert_close(tensors_of(ema.module), slow.average, rtol=1e-5, atol=1e-5)
    assert ema.restarts == 2


def slow_momentum(name, steps, interval):
    blends = steps // interval
    if name == 'RestartableConstantEMA':
        return 0.01
    if name == 'RestartableDebiasedEMA':
        return 0.01 / (1 - 0.99 ** (blends + 1))
    if name == 'RestartableThresholdEMA':
        return 1 - min(0.99, (2 + steps) / (11 + steps))
    if name == 'RestartableAnnealingEMA':
        return max(0.01, 20 / (20 + steps))
    if name == 'RestartablePowerRampEMA':
        return max(0.01, (1 + steps) ** (-2 / 3))
    if name == 'RestartableUniformAverage':
        return 1 / (1 + blends)
    return 1 - (1 - 1 / (blends + 1)) ** 7.937203937601809


@LIVE
def test_the_live_values_and_the_restarts_come_back_with_the_state(name):
    live = next(iter(CLASSES[name]))
    ema, model = made(name), one_weight()
    for _ in range(5):
        ema.update_parameters(model)
    ema.restart(steps=3, **{live: 0.02})
    other = made(name)
    other.load_state_dict(ema.state_dict())
    assert (int(other.steps), other.restarts, getattr(other, live)) == (3, 1, 0.02)
    assert other.current_momentum == ema.current_momentum
    assert deepcopy(ema).current_momentum == ema.current_momentum


@LIVE
def test_assigning_a_live_value_changes_the_next_update(name):
    for live in made(name).hyperparameters:
        ema = made(name)
        ema.steps.fill_(30)
        values = {
            'sigma_rel': 0.2,
            'gamma': 7.0,
            'factor': 90.0,
            'power': 0.4,
            'max_momentum': 0.002,
        }
        before = ema.current_momentum
        setattr(ema, live, values.get(live, 0.45))
        assert ema.current_momentum != before, live


@ALL
@pytest.mark.parametrize('on_plateau', [None, {'metric': 'score', 'patience': 1}])
def test_restart_hook_and_resume_in_a_real_run(name, on_plateau, tmp_path):
    def run(epochs, **settings):
        hook = dict(type='EMARestartHook', milestones=[2], on_plateau=on_plateau)
        average = dict(type='EMAHook', ema_type=name, **CLASSES[name])
        runner = make_runner(tmp_path, hook, epochs=epochs, ema=average, **settings)
        runner.train()
        return ema_of(runner)

    first = run(3)
    assert first.restarts >= 1
    # These schedules fit a stage of any length; a constant momentum does not.
    advised = any('the horizon of' in log.read_text() for log in tmp_path.glob('*/*.log'))
    assert advised == (name == 'RestartableConstantEMA')
    steps, restarts = int(first.steps), first.restarts
    again = run(3, resume=True)
    assert (int(again.steps), again.restarts) == (steps, restarts)


def test_restart_hook_refuses_a_value_that_the_schedule_lacks(tmp_path):
    average = dict(type='EMAHook', ema_type='mmema.RestartablePowerFunctionEMA')
    plateau = {'metric': 'score', 'patience': 1, 'momentum_add': 0.01}
    for arguments in ({'momentum': 0.1}, {'gamma': 3}, {'on_plateau': plateau}):
        hook = dict(type='EMARestartHook', milestones=[1], **arguments)
        runner = make_runner(tmp_path, hook, ema=average)
        with pytest.raises(ValueError, match='can only change .* it has sigma_rel'):
            runner.train()


@ALL
def test_registered_under_both_names(name):
    cls = getattr(mmema, name)
    assert MODELS.get(name) is MODELS.get(f'mmema.{name}') is cls
    assert name in mmema.__all__


@pytest.mark.parametrize('library', ['mmdet', 'mmyolo'])
@ALL
def test_bare_name_resolves_in_the_scope_of_a_library(name, library):
    registry = pytest.importorskip(f'{library}.registry')
    assert registry.MODELS.get(name) is getattr(mmema, name)


@LIVE
@pytest.mark.parametrize('value', [0, 1, -0.1, 1.5, float('nan'), '0.1', True])
def test_bad_values_are_refused_with_rule_and_value(name, value):
    live = next(iter(CLASSES[name]))
    with pytest.raises((TypeError, ValueError), match=f'{live} must be .*got'):
        made(name, **{live: value})
    ema = made(name)
    with pytest.raises((TypeError, ValueError), match=f'{live} must be .*got'):
        ema.restart(**{live: value})
    assert (ema.restarts, getattr(ema, live)) == (0, CLASSES[name][live])


@pytest.mark.parametrize(
    ('name', 'argument', 'values'),
    [
        ('RestartableThresholdEMA', 'factor', [1, 0, math.inf, 'x']),
        ('RestartableThresholdEMA', 'offset', [2, -1, True, 'x']),
        ('RestartableAnnealingEMA', 'gamma', [0, -1, math.inf, 'x']),
        ('RestartablePowerRampEMA', 'gamma', [0, -1, math.inf, 'x']),
        ('RestartablePowerRampEMA', 'power', [0, -1, math.inf, 'x']),
        ('RestartablePowerRampEMA', 'max_momentum', [0, 1.01, 'x']),
        ('RestartablePowerFunctionEMA', 'sigma_rel', [0.29, 1]),
    ],
)
def test_bad_arguments_are_refused_with_rule_and_value(name, argument, values):
    for value in values:
        with pytest.raises((TypeError, ValueError), match=f'{argument} must be .*got'):
            made(name, **{argument: value})


@pytest.mark.parametrize('name', [*CLASSES, 'ExpMomentumEMA', 'RestartableExpMomentumEMA'])
def test_the_constructor_lists_every_argument(name):
    # EMAHook refuses by this list before a run.
    arguments = inspect.signature(getattr(mmema, name)).parameters
    common = ['interval', 'device', 'update_buffers', 'exclude', 'skip_non_finite']
    fields = dataclasses.fields(made(name).schedule)
    own = [field.name for field in fields]
    assert list(arguments) == ['model', *own, *common]
    assert [arguments[key].default for key in own] == [field.default for field in fields]
    assert [arguments[key].default for key in common] == [1, None, False, (), False]


@ALL
def test_misspelt_arguments_are_refused(name):
    with pytest.raises(TypeError, match='momentun'):
        made(name, momentun=0.1)
    with pytest.raises(ValueError, match='can only change .*, got momentun; it has'):
        made(name).check_restart(momentun=0.1)
    with pytest.raises((TypeError, ValueError), match='momentun'):
        made(name).restart(momentun=0.1)


# --- the uniform average -----------------------------------------------------------------------


def test_the_uniform_average_is_torchs_averaged_model():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
    ours = mmema.RestartableUniformAverage(model)
    theirs = torch.optim.swa_utils.AveragedModel(model)
    random = seeded(2)
    for _ in range(7):
        shake(model, random)
        ours.update_parameters(model)
        theirs.update_parameters(model)
    for mine, other in zip(ours.module.parameters(), theirs.module.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('interval', [1, 2])
def test_begun_with_a_restart_the_uniform_average_is_swa(interval):
    model = one_weight()
    ema = mmema.RestartableUniformAverage(model, interval=interval)
    for value in (100.0, 50.0, 7.0, 1.0, 3.0, 8.0):
        if value == 7.0:
            ema.restart()
        nn.init.constant_(model.weight, value)
        ema.update_parameters(model)
    # since the restart 7, 1, 3, 8; with interval 2 those at steps 0 and 2
    assert ema.module.weight.item() == pytest.approx(19 / 4 if interval == 1 else 5.0)


def test_a_soft_restart_of_the_uniform_average_weighs_the_mean_so_far():
    model = one_weight(8.0)
    ema = mmema.RestartableUniformAverage(model)
    for _ in range(100):
        ema.update_parameters(model)
    ema.restart(steps=3)
    nn.init.constant_(model.weight, 0.0)
    ema.update_parameters(model)
    assert ema.module.weight.item() == pytest.approx(6.0)  # 3/4 of 8
    with pytest.raises(ValueError, match='must change one of none'):
        ema.restart(steps=None)
    with pytest.raises(ValueError, match='got momentum; it has no live value'):
        ema.restart(momentum=0.1)


# --- the schedule in the state -----------------------------------------------------------------


@pytest.mark.parametrize('strict', [False, True])
@pytest.mark.parametrize('nested', [False, True])
def test_a_state_of_another_schedule_is_an_error_that_names_both(strict, nested):
    # It was 'All keys matched': exp and annealing have the same live values.
    model = one_weight()
    state = mmema.RestartableExpMomentumEMA(model).state_dict()
    others = [made('RestartableAnnealingEMA'), made('RestartableConstantEMA')]
    for ema in others:
        target, given = (nn.ModuleList([ema]), {f'0.{k}': v for k, v in state.items()})
        if not nested:
            target, given = ema, state
        with pytest.raises(RuntimeError, match=f"state has 'exp' and {type(ema).__name__} has"):
            target.load_state_dict(given, strict=strict)
    annealing = made('RestartableAnnealingEMA').state_dict()
    with pytest.raises(RuntimeError, match="'annealing' and ExpMomentumEMA has 'exp'"):
        mmema.ExpMomentumEMA(model).load_state_dict(annealing, strict=strict)


def test_the_state_keeps_changed_by_name():
    ema = mmema.RestartableExpMomentumEMA(one_weight(), momentum=0.1, gamma=5)
    ema.gamma = 7
    state = ema.state_dict()
    assert bytes(state['schedule'].tolist()) == b'exp'
    assert (state['changed.momentum'].item(), state['changed.gamma'].item()) == (False, True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_a_state_of_0_1_0_still_loads():
    # It kept `changed` as one tensor, by position, and no schedule.
    ema = mmema.RestartableExpMomentumEMA(one_weight(), momentum=0.1, gamma=5)
    ema.restart(steps=4, gamma=7)
    state = ema.state_dict()
    old = {k: v for k, v in state.items() if k != 'schedule' and not k.startswith('changed')}
    old['changed'] = torch.tensor([False, True])
    loaded = mmema.RestartableExpMomentumEMA(one_weight(), momentum=0.2, gamma=9)
    loaded.load_state_dict(old)
    assert (int(loaded.steps), loaded.momentum, loaded.gamma, loaded.restarts) == (4, 0.2, 7, 1)


def test_a_restart_can_be_checked_beforehand():
    ema = mmema.RestartableExpMomentumEMA(one_weight(), momentum=0.1, gamma=5)
    ema.check_restart(0, gamma=7)
    for steps, changes, message in (
        (0, {'sigma_rel': 0.1}, 'can only change .* got sigma_rel; it has momentum, gamma'),
        (None, {}, 'must change one of momentum, gamma'),
        (-1, {}, 'steps must be at least 0, got -1'),
        (0, {'momentum': 1.0}, r'momentum must be in \(0, 1\), got 1.0'),
    ):
        with pytest.raises(ValueError, match=message):
            ema.check_restart(steps, **changes)
    assert (ema.restarts, ema.hyperparameters) == (0, {'momentum': 0.1, 'gamma': 5})
