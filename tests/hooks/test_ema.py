"""mmema.EMAHook in real runs, and beside each test what MMEngine's EMAHook does there.

The numbers in the names are those of docs/upstream.md.
"""

import copy
from collections import OrderedDict

import pytest
import torch
from marks import BUFFERS, HALF_ON_CPU, since_torch_2_1
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS
from reference import ReferenceEMA, assert_close, blended_names, tensors_of
from runs import EMA, LineModel, assert_same, ema_of, loader, log_of, make_runner, state_of
from torch import nn

import mmema
from mmema.checkpoints.formats import read_weights
from mmema.messages import RunError

OURS = dict(EMA, type='mmema.EMAHook')
STOCK = EMA
BOTH = pytest.mark.parametrize('ema', [OURS, STOCK], ids=['ours', 'stock'])
TEST = dict(
    test_dataloader=loader(shuffle=False), test_cfg=dict(), test_evaluator=dict(type='Score')
)


def weights(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return set(first) == set(second) and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def without_clock(runner):
    """Take out the hook that records what only restartable averages have."""
    runner._hooks = [hook for hook in runner.hooks if type(hook).__name__ != 'Clock']
    return runner


class Initialised(LineModel):
    def init_weights(self):
        for parameter in self.parameters():
            nn.init.normal_(parameter)


class Spy(Hook):
    """What the model holds while it is evaluated."""

    def __init__(self):
        self.seen = []

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(weights(runner.model))

    after_test_iter = after_val_iter


# --- the hook itself ----------------------------------------------------------------------------


def test_the_names_in_the_registry():
    assert HOOKS.get('mmema.EMAHook') is mmema.EMAHook
    assert HOOKS.get('EMAHook') is not mmema.EMAHook


@pytest.mark.parametrize(
    'settings, error, message',
    [
        (dict(momentun=0.1), TypeError, r"takes \(momentum, gamma, .*\), got 'momentun'"),
        (dict(model=nn.Linear(1, 1)), TypeError, "got 'model'"),
        (dict(ema_type='ExponentialMovingAverage', gamma=3), TypeError, "got 'gamma'"),
        (dict(per_optimizer_step=1), TypeError, 'per_optimizer_step must be True or False, got 1'),
        (dict(begin_iter=-1), AssertionError, 'begin_iter'),
    ],
)
def test_bad_arguments_are_refused_at_once(settings, error, message):
    with pytest.raises(error, match=message):
        mmema.EMAHook(**settings)


def test_a_type_that_is_not_known_yet_is_not_an_error():
    mmema.EMAHook(ema_type='AverageOfAnotherLibrary', anything=3)


def test_a_plain_run_is_that_of_the_stock_hook_bit_for_bit(tmp_path):
    states = []
    for number, ema in enumerate((OURS, STOCK)):
        runner = make_runner(tmp_path / str(number), ema=ema, epochs=3)
        runner.train()
        states.append(state_of(runner))
    assert_same(*states)
    files = [torch.load(tmp_path / f'{n}/epoch_3.pth', weights_only=False) for n in range(2)]
    for key in ('state_dict', 'ema_state_dict'):
        assert_same(*(file[key] for file in files))


@pytest.mark.parametrize('begin', [dict(begin_epoch=3), dict(begin_iter=9)])
def test_before_it_begins_the_average_is_a_copy(tmp_path, begin):
    runner = make_runner(tmp_path, ema=dict(OURS, **begin), epochs=3)
    runner.train()
    file = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    for name, tensor in file['state_dict'].items():
        assert torch.equal(tensor, file['ema_state_dict'][f'module.{name}'])
    assert int(ema_of(runner).steps) == 4
    file = torch.load(tmp_path / 'epoch_3.pth', weights_only=False)
    name = 'layers.0.weight'
    assert not torch.equal(file['state_dict'][name], file['ema_state_dict'][f'module.{name}'])


def test_averages_of_mmengine_work_too(tmp_path):
    ema = dict(type='mmema.EMAHook', ema_type='ExponentialMovingAverage', momentum=0.1)
    runner = without_clock(make_runner(tmp_path, ema=ema, epochs=2))
    spy = Spy()
    runner.register_hook(spy)
    runner.train()
    average = weights(ema_of(runner).module)
    assert same(spy.seen[-1], average) and not same(average, weights(runner.model))


# --- 5: train(), then test() or val() ----------------------------------------------------------


@BOTH
@pytest.mark.parametrize('then', ['test', 'val'])
def test_5_what_was_trained_is_evaluated(tmp_path, ema, then):
    # mmengine 0.10.7: before_run makes a new average of the raw weights.
    runner = make_runner(tmp_path, ema=ema, epochs=2, **TEST)
    spy = Spy()
    runner.register_hook(spy)
    runner.train()
    average, raw = weights(ema_of(runner).module), weights(runner.model)
    getattr(runner, then)()
    ours = ema is OURS
    assert same(spy.seen[-1], average) == ours
    assert int(ema_of(runner).steps) == (8 if ours else 0)
    assert same(weights(runner.model), raw)


def test_5_another_run_or_model_gets_its_own_average(tmp_path):
    hook = mmema.EMAHook(momentum=0.1)
    runner = make_runner(tmp_path / 'a', ema=STOCK, epochs=1)
    hook.before_run(runner)
    first = hook.ema_model
    hook.before_run(runner)
    assert hook.ema_model is first
    runner.model = LineModel()
    hook.before_run(runner)
    assert hook.ema_model is not first
    second = hook.ema_model
    hook.before_run(make_runner(tmp_path / 'b', ema=STOCK, model=runner.model))
    assert hook.ema_model is not second


# --- 6, 7, 13: loading and resuming ---------------------------------------------------------------


@BOTH
def test_6_loading_after_a_resume_loads_the_averaged_weights(tmp_path, ema):
    # mmengine 0.10.7: `runner._resume` decides, for ever.
    make_runner(tmp_path, ema=ema, epochs=1).train()
    runner = make_runner(tmp_path, ema=ema, epochs=2, resume=True)
    runner.train()
    assert int(ema_of(runner).steps) == 8
    runner.load_checkpoint(str(tmp_path / 'epoch_1.pth'))
    file = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    assert same(weights(runner.model), file['state_dict']) == (ema is OURS)


@BOTH
def test_6_resume_called_by_hand_resumes(tmp_path, ema):
    make_runner(tmp_path, ema=ema, epochs=1).train()
    runner = make_runner(tmp_path, ema=ema, epochs=1)
    runner.train()
    runner.resume(str(tmp_path / 'epoch_1.pth'))
    file = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    raw = {name: file['ema_state_dict'][f'module.{name}'] for name in file['state_dict']}
    assert same(weights(runner.model), raw) == (ema is OURS)
    assert same(weights(ema_of(runner).module), file['state_dict'])


def test_a_resumed_run_is_the_continuous_one_bit_for_bit(tmp_path):
    whole = make_runner(tmp_path / 'a', ema=OURS, epochs=4)
    whole.train()
    make_runner(tmp_path / 'b', ema=OURS, epochs=4).train()
    rest = make_runner(
        tmp_path / 'b',
        ema=OURS,
        epochs=4,
        resume=True,
        load_from=str(tmp_path / 'b/epoch_2.pth'),
    )
    rest.train()
    assert_same(state_of(whole), state_of(rest))


def saved(tmp_path, form):
    """Save weights in one of the forms that people have; return them and the file."""
    state = weights(LineModel(seed=5))
    for tensor in state.values():
        tensor += 1
    content = {
        'plain': dict(state_dict=state),
        'bare': state,
        'prefixed': dict(state_dict={f'module.{key}': value for key, value in state.items()}),
        'partial': dict(state_dict={k: v for k, v in state.items() if 'layers.2' not in k}),
        'other shape': dict(state_dict=dict(state, **{'layers.2.weight': torch.zeros(7, 4)})),
    }[form]
    torch.save(content, tmp_path / 'weights.pth')
    return state, str(tmp_path / 'weights.pth')


FORMS = pytest.mark.parametrize('form', ['plain', 'bare', 'prefixed', 'partial', 'other shape'])


@FORMS
def test_7_any_weights_are_evaluated_as_they_were_loaded(tmp_path, form):
    state, file = saved(tmp_path, form)
    runner = make_runner(tmp_path, ema=OURS, load_from=file, **TEST)
    spy = Spy()
    runner.register_hook(spy)
    runner.test()
    assert same(spy.seen[-1], weights(runner.model))
    assert torch.equal(spy.seen[-1]['layers.0.weight'], state['layers.0.weight'])


@FORMS
def test_7_any_weights_are_trained_from(tmp_path, form):
    state, file = saved(tmp_path, form)
    runner = make_runner(tmp_path, ema=OURS, load_from=file, epochs=1, model=Initialised())

    class Look(Hook):
        priority = 'LOW'

        def before_train_epoch(self, runner):
            assert same(weights(ema_of(runner).module), weights(runner.model))
            self.first = weights(runner.model)

    look = Look()
    runner.register_hook(look)
    runner.train()
    assert torch.equal(look.first['layers.0.weight'], state['layers.0.weight'])


def test_7_stock_crashes_on_bare_weights_and_evaluates_random_ones(tmp_path):
    # mmengine 0.10.7
    _, file = saved(tmp_path, 'bare')
    with pytest.raises(KeyError, match='state_dict'):
        make_runner(tmp_path, ema=STOCK, load_from=file, **TEST).test()
    state, file = saved(tmp_path, 'prefixed')
    runner = make_runner(tmp_path, ema=STOCK, load_from=file, **TEST)
    spy = Spy()
    runner.register_hook(spy)
    runner.test()
    assert not torch.equal(spy.seen[-1]['layers.0.weight'], state['layers.0.weight'])


def test_7_what_is_missing_is_named(tmp_path, warnings_seen):
    _, file = saved(tmp_path, 'partial')
    runner = make_runner(tmp_path, ema=OURS, load_from=file, **TEST)
    runner.logger.addHandler(warnings_seen.handler)
    runner.test()
    assert 'layers.2.weight' in warnings_seen.text


def broken(tmp_path, change):
    """Train an epoch, change the checkpoint and return its name."""
    make_runner(tmp_path, ema=STOCK, epochs=1).train()
    file = tmp_path / 'epoch_1.pth'
    checkpoint = torch.load(file, weights_only=False)
    change(checkpoint)
    torch.save(checkpoint, file)
    return str(file)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda c: c['ema_state_dict'].pop('steps'), "epoch_1.pth lacks 'steps'"),
        (
            lambda c: c['ema_state_dict'].pop('module.layers.0.weight'),
            "epoch_1.pth lacks 'module.layers.0.weight'",
        ),
        (lambda c: c['state_dict'].pop('layers.0.weight'), "lacks 'layers.0.weight'"),
        (
            lambda c: c['ema_state_dict'].update({'module.layers.0.bias': torch.ones(7)}),
            "epoch_1.pth has other shapes than the model for 'layers.0.bias'",
        ),
    ],
)
@pytest.mark.parametrize('average', [{}, dict(ema_type='ExponentialMovingAverage')])
def test_13_an_incomplete_state_is_not_resumed(tmp_path, change, message, average):
    # mmengine 0.10.7: a state without `steps` loads, and the next update replaces the average.
    file = broken(tmp_path, change)
    ema = dict(type='mmema.EMAHook', momentum=0.1, **average)
    runner = make_runner(tmp_path, ema=ema, epochs=2, resume=True, load_from=file)
    with pytest.raises(ValueError, match=message):
        runner.train()
    assert int(ema_of(runner).steps) == 0


def test_13_a_state_of_another_schedule_is_one_clear_error(tmp_path):
    make_runner(tmp_path, ema=OURS, epochs=1).train()
    ema = dict(type='mmema.EMAHook', ema_type='mmema.RestartableConstantEMA', momentum=0.1)
    runner = make_runner(tmp_path, ema=ema, epochs=2, resume=True)
    with pytest.raises(RunError, match="the average: .* has 'exp' and RestartableConstantEMA has"):
        runner.train()


def test_13_stock_replaces_the_average(tmp_path):
    file = broken(tmp_path, lambda checkpoint: checkpoint['ema_state_dict'].pop('steps'))
    ema = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.1)
    runner = make_runner(tmp_path, ema=ema, epochs=2, resume=True, load_from=file)
    without_clock(runner)
    runner.train()
    assert int(ema_of(runner).steps) == 4  # of 8: it began again


@BOTH
def test_a_checkpoint_without_an_average_is_resumed_with_a_copy(tmp_path, ema, warnings_seen):
    file = broken(tmp_path, lambda checkpoint: checkpoint.pop('ema_state_dict'))
    runner = make_runner(tmp_path, ema=ema, epochs=2, resume=True, load_from=file)
    runner.logger.addHandler(warnings_seen.handler)
    runner.train()
    assert int(ema_of(runner).steps) == 4
    words = (  # people search for MMEngine's, and its own test looks for them
        'There is no `ema_state_dict` in checkpoint. `EMAHook` will make a copy of `state_dict` as '
        'the initial `ema_state_dict`'
    )
    assert words in warnings_seen.text
    assert (f'{words} ({file})' in warnings_seen.text) == (ema is OURS)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(tmp_path, warnings_seen):
    # No EMARestartHook is needed. MMEngine opens the file that was cut short, and fails.
    whole = make_runner(tmp_path / 'a', ema=OURS, epochs=3)
    whole.train()
    make_runner(tmp_path / 'b', ema=OURS, epochs=3).train()
    cut = tmp_path / 'b/epoch_3.pth'
    cut.write_bytes(cut.read_bytes()[:-1000])
    with pytest.raises((OSError, RuntimeError)):  # torch 2.13, torch 2.0
        make_runner(tmp_path / 'b', ema=STOCK, epochs=3, resume=True).train()
    rest = make_runner(tmp_path / 'b', ema=OURS, epochs=3, resume=True)
    rest.logger.addHandler(warnings_seen.handler)
    rest.train()
    assert 'epoch_3.pth is cut short' in warnings_seen.text
    assert_same(state_of(whole), state_of(rest))


def test_loading_by_hand_before_the_run(tmp_path):
    state, file = saved(tmp_path, 'plain')
    runner = make_runner(tmp_path, ema=OURS, **TEST)
    runner.load_checkpoint(file)
    runner.test()
    assert same(weights(ema_of(runner).module), state)
    with pytest.raises(AttributeError):
        make_runner(tmp_path, ema=STOCK).load_checkpoint(file)


# --- 8: deploy form -------------------------------------------------------------------------------


class Branches(nn.Module):
    """Two parallel layers, fused into one for deployment, as RepVGG does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def switch_to_deploy(self):
        self.fused = nn.Linear(3, 3)
        with torch.no_grad():
            self.fused.weight.data = self.a.weight + self.b.weight
            self.fused.bias.data = self.a.bias + self.b.bias
        del self.a, self.b

    def forward(self, x):
        return self.fused(x) if hasattr(self, 'fused') else self.a(x) + self.b(x)


class DeployModel(LineModel):
    def __init__(self):
        super().__init__()
        self.norm = Branches()


class Deploy(Hook):
    """What mmyolo's SwitchToDeployHook does."""

    def before_test_epoch(self, runner):
        for module in list(runner.model.modules()):
            if isinstance(module, Branches) and not hasattr(module, 'fused'):
                module.switch_to_deploy()


@BOTH
def test_8_test_in_deploy_form(tmp_path, ema):
    # mmyolo tools/test.py --deploy; mmengine 0.10.7 swaps tensors in the order they happen to have.
    def make(load_from=None):
        model = DeployModel()
        return make_runner(tmp_path, ema=ema, epochs=1, model=model, load_from=load_from, **TEST)

    make().train()
    runner = make(str(tmp_path / 'epoch_1.pth'))
    expected = runner.test()
    runner = make(str(tmp_path / 'epoch_1.pth'))
    runner.register_hook(Deploy())
    if ema is STOCK:
        with pytest.raises(RuntimeError):
            runner.test()
    else:
        assert runner.test() == pytest.approx(expected)
        assert runner.test() == pytest.approx(expected)  # and once more


def test_8_deploy_form_after_training_in_the_same_run(tmp_path, warnings_seen):
    runner = make_runner(tmp_path, ema=OURS, epochs=1, model=DeployModel(), **TEST)
    runner.logger.addHandler(warnings_seen.handler)
    runner.train()
    expected = runner.test()
    runner.register_hook(Deploy())
    assert runner.test() == pytest.approx(expected)
    assert runner.test() == pytest.approx(expected)
    assert 'it keeps them, and cannot be trained on' in warnings_seen.text
    runner.save_checkpoint(str(tmp_path), 'deployed.pth')
    file = torch.load(tmp_path / 'deployed.pth', weights_only=False)
    assert 'norm.fused.weight' in file['state_dict'] and 'ema_state_dict' not in file


def test_8_training_on_in_deploy_form_is_one_clear_error(tmp_path):
    runner = make_runner(tmp_path, ema=OURS, epochs=1, model=DeployModel(), **TEST)
    runner.train()
    runner.register_hook(Deploy())
    runner.test()
    with pytest.raises(ValueError, match="lacks \\['norm.a.bias'"):
        runner.call_hook('after_train_iter', batch_idx=0)


# --- 9: steps of the optimizer --------------------------------------------------------------------


@BOTH
def test_9_accumulated_gradients_are_one_update(tmp_path, ema):
    # mmengine 0.10.7: one update for each iteration.
    wrapper = dict(optimizer=dict(type='SGD', lr=0.05), accumulative_counts=4)
    runner = make_runner(tmp_path, ema=ema, epochs=2, optim_wrapper=wrapper)
    runner.train()
    assert int(ema_of(runner).steps) == (2 if ema is OURS else 8)


def test_9_the_last_incomplete_accumulation_counts(tmp_path):
    wrapper = dict(optimizer=dict(type='SGD', lr=0.05), accumulative_counts=3)
    runner = make_runner(tmp_path, ema=OURS, epochs=2, optim_wrapper=wrapper)
    runner.train()
    assert int(ema_of(runner).steps) == 3  # after iterations 3, 6 and 8


def test_9_by_iterations_where_asked(tmp_path):
    wrapper = dict(optimizer=dict(type='SGD', lr=0.05), accumulative_counts=4)
    ema = dict(OURS, per_optimizer_step=False)
    runner = make_runner(tmp_path, ema=ema, epochs=2, optim_wrapper=wrapper)
    runner.train()
    assert int(ema_of(runner).steps) == 8


class Scaled(OptimWrapper):
    """What AmpOptimWrapper does, on the CPU; the gradients of some iterations overflow."""

    def __init__(self, overflow=(), **kwargs):
        super().__init__(**kwargs)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
        self.overflow = overflow

    def backward(self, loss, **kwargs):
        if self._inner_count in self.overflow:
            loss = loss * torch.inf
        self.loss_scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def step(self, **kwargs):
        self.loss_scaler.step(self.optimizer, **kwargs)
        self.loss_scaler.update()


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='GradScaler of the CPU: torch 2.3')
@pytest.mark.parametrize('fused', [False, True])
@BOTH
def test_9_steps_that_mixed_precision_skips_are_no_updates(tmp_path, ema, fused):
    runner = make_runner(tmp_path, ema=ema, epochs=2)
    optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.05, fused=fused)
    runner.optim_wrapper = Scaled(overflow=(1, 2, 6), optimizer=optimizer)
    runner.param_schedulers = None
    runner.train()
    assert int(ema_of(runner).steps) == (5 if ema is OURS else 8)


def test_9_an_optimizer_that_tells_nothing_is_asked_what_it_means_to_do(tmp_path):
    class Silent(torch.optim.SGD):
        register_step_post_hook = property()

    wrapper = dict(accumulative_counts=2)
    runner = make_runner(tmp_path, ema=OURS, epochs=1)
    optimizer = Silent(runner.model.parameters(), lr=0.05)
    runner.optim_wrapper = OptimWrapper(optimizer=optimizer, **wrapper)
    runner.param_schedulers = None
    runner.train()
    assert int(ema_of(runner).steps) == 2


def test_9_a_replaced_optimizer_is_watched(tmp_path):
    class Replace(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                new = torch.optim.SGD(runner.model.parameters(), lr=0.05)
                runner.optim_wrapper.optimizer = new

    runner = make_runner(tmp_path, Replace(), ema=OURS, epochs=2)
    runner.train()
    assert int(ema_of(runner).steps) == 8


# --- 10: validations that fail --------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    pass


def failing(at):
    """Return a hook that is interrupted at one point of a validation."""

    def interrupt(self, runner, *args, **kwargs):
        raise Interrupted

    return type('Fail', (Hook,), {'priority': 'LOW', at: interrupt})()


@BOTH
@pytest.mark.parametrize('at', ['before_val_epoch', 'after_val_iter'])
def test_10_an_interrupted_validation_leaves_the_trained_weights(tmp_path, ema, at):
    # mmengine 0.10.7: the model is left with the averaged weights, and so is the next checkpoint.
    runner = make_runner(tmp_path, failing(at), ema=ema, epochs=2)

    class Look(Hook):
        priority = 'LOWEST'

        def after_train_epoch(self, runner):
            self.raw = weights(runner.model)

    look = Look()
    runner.register_hook(look)
    with pytest.raises(Interrupted):
        runner.train()
    assert same(weights(runner.model), look.raw) == (ema is OURS)


def test_10_training_goes_on_after_an_error_that_somebody_caught(tmp_path):
    states = []
    for fails in (False, True):
        runner = make_runner(tmp_path / str(fails), ema=OURS, epochs=2)
        if fails:
            runner._val_loop = runner.build_val_loop(runner._val_loop)
            run, failed = runner._val_loop.run, []

            def brittle(run=run, failed=failed, runner=runner):
                if not failed:
                    failed.append(True)
                    runner.call_hook('before_val_epoch')
                    return {}  # a loop that never calls after_val_epoch
                return run()

            runner._val_loop.run = brittle
        runner.train()
        states.append(state_of(runner))
    assert_same(*states)


def test_a_checkpoint_saved_during_a_validation_holds_both_weights_rightly(tmp_path):
    class Save(Hook):
        def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            runner.save_checkpoint(str(tmp_path), 'inside.pth')

    runner = make_runner(tmp_path, Save(), ema=OURS, epochs=1)
    runner.train()
    file = torch.load(tmp_path / 'inside.pth', weights_only=False)
    assert same(file['state_dict'], weights(ema_of(runner).module))
    raw = {key[7:]: v for key, v in file['ema_state_dict'].items() if key.startswith('module.')}
    assert same(raw, weights(runner.model))


# --- 11: the first copy ---------------------------------------------------------------------------


@BOTH
def test_11_the_first_copy_is_taken_after_init_weights(tmp_path, ema):
    # mmengine 0.10.7: evaluated before the first update, the average is another random model.
    class ValidateFirst(Hook):
        priority = 'LOWEST'

        def before_train(self, runner):
            runner.val_loop.run()

    spy = Spy()
    runner = make_runner(tmp_path, ValidateFirst(), spy, ema=ema, epochs=1, model=Initialised())

    class Look(Hook):
        def before_train(self, runner):
            self.raw = weights(runner.model)

    look = Look()
    runner.register_hook(look, priority='VERY_HIGH')
    runner.train()
    assert same(spy.seen[0], look.raw) == (ema is OURS)


# --- 14: sixteen bits -----------------------------------------------------------------------------


class Half(BaseModel):
    """bf16 or fp16 parameters, and a loss of its own."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1).to(dtype)

    def forward(self, x, y=None, mode='tensor'):
        out = self.layer(x.to(self.layer.weight.dtype)).float()
        if mode == 'loss':
            return dict(loss=(out - y).square().mean())
        return [dict(error=(out - y).square())] if mode == 'predict' else out


class Record(Hook):
    """The raw weights of every iteration."""

    priority = 'VERY_HIGH'

    def __init__(self):
        self.seen = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append({n: t.detach().clone() for n, t in tensors_of(runner.model).items()})


@pytest.mark.parametrize('dtype', [torch.bfloat16, pytest.param(torch.float16, marks=HALF_ON_CPU)])
def test_14_sixteen_bits_follow_the_reference_through_validations_and_resume(tmp_path, dtype):
    # mmengine 0.10.7: a validation rounds the average to the dtype of the model.
    def make(folder, **settings):
        return make_runner(
            tmp_path / folder,
            ema=dict(OURS, momentum=0.01, gamma=3),
            epochs=6,
            model=Half(dtype),
            **settings,
        )

    runner, record = make('whole'), Record()
    runner.register_hook(record)
    runner.train()
    reference = ReferenceEMA(record.seen[0], blended_names(runner.model, False), 0.01, 3)
    for seen in record.seen:
        reference.update(seen)
    average = tensors_of(ema_of(runner).module)
    assert all(tensor.dtype == torch.float32 for tensor in average.values())
    assert_close(average, reference.average, rtol=1e-6, atol=1e-7)
    assert runner.model.layer.weight.dtype == dtype

    make('part').train()
    rest = make('part', resume=True, load_from=str(tmp_path / 'part/epoch_3.pth'))
    rest.train()
    assert_same(state_of(runner), state_of(rest))

    # Readers that know nothing of this load the float32 file into a 16-bit model.
    shipped = Half(dtype)
    file = torch.load(tmp_path / 'whole/epoch_6.pth', weights_only=False)
    shipped.load_state_dict(file['state_dict'])
    assert torch.equal(shipped.layer.weight, average['layer.weight'].to(dtype))


def test_14_stock_rounds_the_average():
    hook = mmema.hooks.ema.StockEMAHook(ema_type='mmema.ExpMomentumEMA')
    hook.src_model = Half(torch.bfloat16)
    hook.ema_model = mmema.ExpMomentumEMA(hook.src_model)
    with torch.no_grad():
        hook.ema_model.module.layer.weight.fill_(1.001)
    for _ in range(2):
        hook._swap_ema_parameters()
    assert hook.ema_model.module.layer.weight[0, 0] == 1.0


# --- what is not finite ---------------------------------------------------------------------------


class Poison(Hook):
    priority = 'VERY_HIGH'

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 2:
            runner.model.norm.running_mean[0] = float('nan')
        if runner.iter == 3:
            runner.model.norm.running_mean.zero_()


@pytest.mark.parametrize('guard', [False, True])
def test_nan_is_named_and_kept_out_where_asked(tmp_path, guard, warnings_seen):
    # ultralytics 24615, 24986: the average is NaN for ever, then no checkpoint is saved at all.
    ema = dict(OURS, update_buffers=True, skip_non_finite=guard)
    runner = make_runner(tmp_path, Poison(), ema=ema, epochs=2)
    runner.logger.addHandler(warnings_seen.handler)
    runner.train()
    assert (tmp_path / 'epoch_2.pth').is_file()
    finite = bool(ema_of(runner).module.norm.running_mean.isfinite().all())
    assert finite == guard
    skipped = "not finite in the model, so left out of the average: 'norm.running_mean'"
    poisoned = "not finite in the average: 'norm.running_mean'"
    assert warnings_seen.text.count(skipped) == (1 if guard else 0)
    assert warnings_seen.text.count(poisoned) == (0 if guard else 1)
    if guard:
        assert ema_of(runner).skipped == {'norm.running_mean': 1}


def test_infinities_that_belong_to_the_model_are_not_reported(tmp_path, warnings_seen):
    model = LineModel()
    model.register_buffer('mask', torch.tensor([0.0, -torch.inf]))
    runner = make_runner(tmp_path, ema=OURS, epochs=1, model=model)
    runner.logger.addHandler(warnings_seen.handler)
    runner.train()
    assert 'not finite' not in warnings_seen.text


# --- what happens to models in a run --------------------------------------------------------------


@since_torch_2_1('does not compile on Python 3.11')
def test_a_model_that_is_compiled_during_the_run(tmp_path):
    class Compile(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                runner.model.layers[0] = torch.compile(runner.model.layers[0], backend='eager')

    states = []
    for hooks in ([], [Compile()]):
        runner = make_runner(tmp_path / str(len(hooks)), *hooks, ema=OURS, epochs=3)
        runner.train()
        states.append(weights(ema_of(runner).module))
    assert_same(*states)
    file = torch.load(tmp_path / '1/epoch_3.pth', weights_only=False)
    name = 'layers.0._orig_mod.weight'
    assert torch.equal(file['state_dict'][name], states[0]['layers.0.weight'])
    fresh = make_runner(tmp_path / '1', Compile(), ema=OURS, epochs=3, **TEST)
    fresh.model.layers[0] = torch.compile(fresh.model.layers[0], backend='eager')
    fresh.load_checkpoint(str(tmp_path / '1/epoch_3.pth'))
    assert torch.equal(fresh.model.layers[0].weight, states[0]['layers.0.weight'])


def test_a_deep_copy_of_the_hook_has_nothing_of_the_run():
    hook = copy.deepcopy(mmema.EMAHook(momentum=0.1))
    assert hook.ema_model is None and hook.ema_cfg['momentum'] == 0.1


def test_what_no_checkpoint_holds_begins_as_the_models_after_a_resume(tmp_path):
    class WithCache(Initialised):
        def __init__(self):
            super().__init__()
            self.register_buffer('cache', torch.zeros(2), persistent=False)

        def init_weights(self):
            super().init_weights()
            self.cache.fill_(3)

    def make(**settings):
        ema = dict(OURS, update_buffers=True)
        return make_runner(tmp_path, ema=ema, model=WithCache(), **settings)

    make(epochs=1).train()
    runner = make(epochs=2, resume=True)
    runner.train()
    assert torch.equal(ema_of(runner).module.cache, torch.full((2,), 3.0))


def test_an_average_that_no_step_moves_is_an_error(tmp_path):
    @OPTIM_WRAPPERS.register_module(force=True)
    class OwnStep(OptimWrapper):
        """Steps in a way of its own, as sharpness-aware minimisation does."""

        def step(self, **kwargs):
            with torch.no_grad():
                for parameter in self.optimizer.param_groups[0]['params']:
                    parameter.sub_(0.01 * parameter.grad)

    wrapper = dict(type='OwnStep', optimizer=dict(type='SGD', lr=0.05))
    runner = make_runner(tmp_path / 'a', ema=OURS, optim_wrapper=wrapper, epochs=2)
    with pytest.raises(RunError, match='no optimizer told of a step in 4 iterations. Set per_opt'):
        runner.train()
    assert not [*(tmp_path / 'a').glob('*.pth')]  # of initial weights
    asked = dict(OURS, per_optimizer_step=False)
    runner = make_runner(tmp_path / 'b', ema=asked, optim_wrapper=wrapper, epochs=2)
    runner.train()
    assert ema_of(runner).steps == 8
    assert 'has not moved' not in log_of(runner)


class Wraps(torch.optim.Optimizer):
    """Wraps another one as Lookahead, SAM and many more do: without super().__init__()."""

    def __init__(self, base):
        self.base, self.defaults = base, base.defaults
        self.state, self.param_groups = base.state, base.param_groups

    def step(self, closure=None):
        self.base.step()

    def zero_grad(self, set_to_none=True):
        self.base.zero_grad()

    def state_dict(self):
        return self.base.state_dict()


class WrapsWithHooks(Wraps):
    """The same with the dicts of torch's hooks, which nothing calls (pytorch_optimizer 122)."""

    def __init__(self, base):
        super().__init__(base)
        self._optimizer_step_pre_hooks = OrderedDict()
        self._optimizer_step_post_hooks = OrderedDict()


@pytest.mark.parametrize('kind', [Wraps, WrapsWithHooks])
@pytest.mark.parametrize('counts', [1, 2])
def test_9_an_optimizer_that_wraps_another(tmp_path, kind, counts):
    model = LineModel()
    optimizer = kind(kind(torch.optim.SGD(model.parameters(), 0.05)))
    runner = make_runner(
        tmp_path,
        ema=OURS,
        model=model,
        epochs=1,
        optim_wrapper=OptimWrapper(optimizer, accumulative_counts=counts),
        param_scheduler=None,
    )
    runner.train()
    assert int(ema_of(runner).steps) == 4 // counts


def test_an_epoch_whose_steps_were_all_skipped_is_no_error(tmp_path):
    runner = make_runner(tmp_path, ema=OURS, epochs=2)

    class Skips(OptimWrapper):
        def step(self, **kwargs):
            if runner.iter >= 4:
                super().step(**kwargs)

    optimizer = torch.optim.SGD(runner.model.parameters(), lr=0.05)
    runner.optim_wrapper, runner.param_schedulers = Skips(optimizer), None
    runner.train()
    assert int(ema_of(runner).steps) == 4
    assert log_of(runner).count('the average has not moved: no optimizer told of a step') == 1


def test_gradients_that_still_accumulate_are_no_reason_to_warn(tmp_path):
    wrapper = dict(accumulative_counts=8, optimizer=dict(type='SGD', lr=0.05))
    runner = make_runner(tmp_path, ema=OURS, optim_wrapper=wrapper, epochs=2)  # 4 iterations each
    runner.train()
    assert ema_of(runner).steps == 1
    assert 'has not moved' not in log_of(runner)


def test_weights_loaded_in_mid_training_are_what_the_average_begins_with(tmp_path):
    other = LineModel(5)
    state = {f'student.{name}': value for name, value in other.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'other.pth')

    class Load(Hook):
        priority = 'VERY_HIGH'

        def before_train_epoch(self, runner):
            if runner.epoch == 1:
                keys = [(r'^student\.', '')]
                runner.load_checkpoint(str(tmp_path / 'other.pth'), revise_keys=keys)

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 4:  # one step later the average is the loaded weights, blended
                step = (runner.model.layers[0].weight - other.layers[0].weight).abs().max()
                apart = ema_of(runner).module.layers[0].weight - other.layers[0].weight
                self.near = bool(apart.abs().max() <= step)

    load = Load()
    runner = make_runner(tmp_path / 'run', load, ema=dict(OURS, momentum=1e-3, gamma=0.1), epochs=2)
    runner.train()
    assert load.near


def test_a_nan_before_the_average_begins_is_kept_out_too(tmp_path):
    class Poison(Hook):
        priority = 'VERY_HIGH'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            weight = runner.model.layers[0].weight
            if runner.iter == 2:
                self.kept = weight.detach().clone()
                weight.data.fill_(torch.nan)

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 3:
                runner.model.layers[0].weight.data.copy_(self.kept)

    settings = dict(OURS, begin_iter=6, skip_non_finite=True)
    runner = make_runner(tmp_path, Poison(), ema=settings, epochs=3)
    runner.train()
    assert all(torch.isfinite(t).all() for t in ema_of(runner).module.parameters())
    assert ema_of(runner).skipped == {'layers.0.weight': 1}


def test_a_loop_that_failed_by_hand_leaves_the_trained_weights(tmp_path):
    class Fail(Hook):
        def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            raise RuntimeError('out of memory')

    class ByHand(Hook):
        priority = 'VERY_LOW'

        def after_train_epoch(self, runner):
            before = weights(runner.model)
            with pytest.raises(RuntimeError, match='out of memory'):
                runner.test_loop.run()
            runner.call_hook('before_train_iter', batch_idx=0)
            assert same(weights(runner.model), before)

    runner = make_runner(tmp_path, Fail(), ByHand(), ema=OURS, epochs=2, **TEST)
    runner.train()
    assert ema_of(runner).steps == 8


def test_what_is_not_finite_again_is_told_again(tmp_path):
    runner = make_runner(tmp_path, ema=OURS, epochs=1)
    runner.train()
    hook = next(hook for hook in runner.hooks if isinstance(hook, mmema.EMAHook))
    weight = hook.ema_model.module.layers[0].weight
    healthy = weight.clone()
    for value in (torch.nan, None, torch.nan):
        weight.copy_(healthy if value is None else torch.full_like(healthy, value))
        hook.ema_model.steps.add_(1)  # MMEngine's logger filters a warning with the same words
        hook.before_save_checkpoint(runner, dict(state_dict=runner.model.state_dict()))
    assert log_of(runner).count("not finite in the average: 'layers.0.weight'") == 2


# --- models with more in their state than tensors of one shape -----------------------------------


def with_extra_state(of):
    """Return a model, one layer of which has an extra state: ``of(number of training passes)``."""

    class Layer(nn.Linear):
        passes, state = 0, None

        def forward(self, x):
            self.passes += self.training
            return super().forward(x)

        def get_extra_state(self):
            return of(self.passes)

        def set_extra_state(self, state):
            self.state = state

    model = LineModel()
    model.layers[0] = Layer(3, 4)
    return model


@BOTH
@pytest.mark.parametrize(
    'of',
    [
        lambda passes: {'passes': passes},
        lambda passes: None,
        lambda passes: torch.zeros(passes, dtype=torch.uint8),
    ],
    ids=['dict', 'None', 'growing'],
)
def test_extra_state_is_resumed(tmp_path, ema, of):
    # TransformerEngine 458: AttributeError on a resume.
    make_runner(tmp_path, ema=ema, epochs=1, model=with_extra_state(of)).train()
    runner = make_runner(tmp_path, ema=ema, epochs=2, model=with_extra_state(of), resume=True)
    runner.train()
    assert int(ema_of(runner).steps) == 8
    saved = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)
    state = saved['ema_state_dict']['module.layers.0._extra_state']
    assert str(state) == str(of(4)) == str(runner.model.layers[0].state)
    if ema is OURS:  # nothing has averaged it: that of the model belongs to both
        assert str(saved['state_dict']['layers.0._extra_state']) == str(of(4))
    found = read_weights(saved)  # as export and inspect read it
    assert 'layers.0.weight' in found.average
    assert ('extra state that is no tensor' in ' '.join(found.notes)) == (
        not isinstance(state, torch.Tensor)
    )


def keep_layers_alone(module, state, prefix, metadata):
    """As MMPretrain's LoRAModel, which drops all keys without 'lora_' in its state_dict hook."""
    for key in [key for key in state if 'layers' not in key]:
        del state[key]


def model_that_drops_keys():
    model = LineModel()
    model._register_state_dict_hook(keep_layers_alone)
    return model


@BOTH
def test_a_state_dict_hook_that_drops_foreign_keys(tmp_path, ema):
    # diffusers 9998: `steps` was lost in silence, and the resume refused.
    settings = dict(ema=ema)
    if ema is OURS:
        settings = dict(ema=dict(ema, also=dict(other=dict(momentum=0.3))))
    whole = make_runner(tmp_path / 'whole', epochs=2, model=model_that_drops_keys(), **settings)
    whole.train()
    saved = torch.load(tmp_path / 'whole/epoch_1.pth', weights_only=False)
    assert int(saved['ema_state_dict']['steps']) == 4
    assert not [key for key in saved['state_dict'] if 'layers' not in key]
    file = str(tmp_path / 'whole/epoch_1.pth')
    settings.update(resume=True, load_from=file)
    rest = make_runner(tmp_path / 'rest', epochs=2, model=model_that_drops_keys(), **settings)
    rest.train()
    assert int(ema_of(rest).steps) == 8
    # The norm's statistics are not in the file, so the rest of the run sees other numbers.
    assert set(saved['state_dict']) == set(whole.model.state_dict())


class Caches(LineModel):
    """Has a buffer that grows in training, and one of eight bits."""

    def __init__(self):
        super().__init__()
        self.register_buffer('cache', torch.zeros(1))
        self.register_buffer('table', torch.ones(4).to(torch.float8_e4m3fn))

    def forward(self, x, y=None, mode='tensor'):
        if self.training:
            self.cache = torch.ones(len(self.cache) + 1)
        return super().forward(x, y, mode)


@pytest.mark.skipif(not hasattr(torch, 'float8_e4m3fn'), reason='torch has no eight-bit floats')
@BOTH
@BUFFERS
def test_a_cache_that_grows_and_a_table_of_eight_bits(tmp_path, ema, update_buffers):
    ema = dict(ema, update_buffers=update_buffers)
    make_runner(tmp_path, ema=ema, epochs=2, model=Caches()).train()
    runner = make_runner(tmp_path, ema=ema, epochs=3, model=Caches(), resume=True)
    runner.train()
    assert torch.equal(ema_of(runner).module.cache, runner.model.cache)
    assert int(ema_of(runner).steps) == 12
    saved = torch.load(tmp_path / 'epoch_2.pth', weights_only=False)
    assert saved['state_dict']['cache'].shape == (9,)
