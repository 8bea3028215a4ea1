import copy
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.runner import Runner
from runs import Line, NormModel, ema, loader, plain_runner

from mmema.run import ema_hook_of, validation_follows

LAST = dict(type='mmema.EMARecalibrateHook')
IN_ORDER = dict(batch_size=4, shuffle=False, length=8)
STATISTICS = ('norm.running_mean', 'norm.running_var')
BEST = dict(type='CheckpointHook', interval=1, save_best='toy/mean', rule='greater')


def by_hand(weights, batches):
    """Mean and unbiased variance of what the linear layer gives, averaged over batches."""
    outs = [batch @ weights['linear.weight'].T + weights['linear.bias'] for batch in batches]
    mean = torch.stack([out.mean(0) for out in outs]).mean(0)
    variance = torch.stack([((out - out.mean(0)) ** 2).sum(0) / (len(out) - 1) for out in outs])
    return mean, variance.mean(0)


def clone(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


class Watch(Hook):
    """Keeps all states before and after the measurement, and those that validation sees."""

    priority = 75  # after EMARecalibrateHook

    def __init__(self):
        self.after, self.validated, self.back = [], [], []

    def after_train_epoch(self, runner):
        self.after.append((clone(runner.model), clone(ema_hook_of(runner).ema_model.module)))

    def before_val_epoch(self, runner):
        self.validated.append(clone(runner.model))

    def after_val_epoch(self, runner, metrics=None):
        self.back.append((clone(runner.model), clone(ema_hook_of(runner).ema_model.module)))


class WatchBefore(Watch):
    priority = 65  # after EMAHook, before EMARecalibrateHook


def run(folder, update_buffers, batches=100, hook=None, ema_hook='EMAHook', **kwargs):
    before, watch = WatchBefore(), Watch()
    hooks = [ema(type=ema_hook, update_buffers=update_buffers), before, watch]
    hooks += [dict(**(hook or LAST), batches=batches)]
    runner = plain_runner(folder, hooks, **kwargs)
    runner.train()
    return runner, before, watch


@pytest.mark.parametrize('ema_hook', ['EMAHook', 'mmema.EMAHook'])
@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize('val_cfg', [{}, dict(type='mmema.EMAValLoop')])
def test_statistics_by_hand(tmp_path, ema_hook, update_buffers, val_cfg):
    # Without noise and in order the batches are 0..3 and 4..7.
    runner, before, watch = run(
        tmp_path,
        update_buffers,
        ema_hook=ema_hook,
        val_cfg=val_cfg,
        train_dataloader=loader(**IN_ORDER),
        default_hooks=dict(checkpoint=BEST),
    )
    (source_before, average_before), (source, average) = before.after[-1], watch.after[-1]
    samples = Line(8).x
    mean, variance = by_hand(average, [samples[:4], samples[4:]])
    torch.testing.assert_close(average['norm.running_mean'], mean)
    torch.testing.assert_close(average['norm.running_var'], variance)
    assert not torch.allclose(average_before['norm.running_mean'], mean, rtol=1e-3)
    # Nothing else changed: the layer that no data reaches, the counters, the source.
    assert all(torch.equal(source[key], source_before[key]) for key in source)
    norm = ema_hook_of(runner).ema_model.module.norm
    assert norm.momentum == 0.1 and norm.training
    others = set(average) - set(STATISTICS)
    assert all(torch.equal(average[key], average_before[key]) for key in others)
    # Validation saw the averaged weights with these statistics, and all went back.
    for key in ('linear.weight', *STATISTICS):
        assert torch.equal(watch.validated[-1][key], average[key])
    assert all(torch.equal(watch.back[-1][0][key], source[key]) for key in source)
    assert all(torch.equal(watch.back[-1][1][key], average[key]) for key in average)
    # The checkpoints hold them as the weights to deploy, the source's as the other ones.
    paths = [tmp_path / 'epoch_3.pth']
    if runner.message_hub.get_info('best_ckpt').endswith('epoch_3.pth'):
        paths.append(runner.message_hub.get_info('best_ckpt'))
    for path in paths:
        checkpoint = torch.load(path, weights_only=False)
        for key in STATISTICS:
            assert torch.equal(checkpoint['state_dict'][key], average[key])
            assert torch.equal(checkpoint['ema_state_dict'][f'module.{key}'], source[key])


@pytest.mark.parametrize('update_buffers', [False, True])
def test_best_checkpoint_has_them(tmp_path, update_buffers):
    _, _, watch = run(
        tmp_path,
        update_buffers,
        epochs=1,
        default_hooks=dict(checkpoint=BEST),
    )
    checkpoint = torch.load(tmp_path / 'best_toy_mean_epoch_1.pth', weights_only=False)
    for key in STATISTICS:
        assert torch.equal(checkpoint['state_dict'][key], watch.after[0][1][key])
        assert torch.equal(checkpoint['ema_state_dict'][f'module.{key}'], watch.after[0][0][key])


def test_number_of_batches(tmp_path):
    _, _, watch = run(tmp_path, False, batches=1, train_dataloader=loader(**IN_ORDER))
    average = watch.after[-1][1]
    mean, variance = by_hand(average, [Line(8).x[:4]])
    torch.testing.assert_close(average['norm.running_mean'], mean)
    torch.testing.assert_close(average['norm.running_var'], variance)


class Random(Hook):
    """Keeps what training draws and sees."""

    def __init__(self):
        self.drawn = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.drawn.append((data_batch['x'].sum().item(), float(outputs['loss'].detach())))

    def after_train_epoch(self, runner):
        state = random.getstate()[1][:3], np.random.get_state()[1].tolist()[:3]
        self.drawn.append((state, torch.get_rng_state().tolist()[:30], clone(runner.model)))
        self.drawn.append(list(runner.train_dataloader.dataset.seen))


@pytest.mark.parametrize('workers', [0, 1])
def test_training_goes_on_as_without_it(tmp_path, workers):
    drawn = []
    for name, hooks in (('without', []), ('with', [dict(**LAST, interval=1)])):
        kept = Random()
        data = loader(4, length=8, noise=0.1)
        data.update(num_workers=workers, persistent_workers=workers > 0)
        plain_runner(
            tmp_path / name,
            [ema(), kept, *hooks],
            model=NormModel(dropout=0.5),
            train_dataloader=data,
        ).train()
        drawn.append(kept.drawn)
    for one, other in zip(*drawn):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize('interval, measured', [(None, [5]), (1, [2, 4, 5]), (2, [4, 5]), (3, [5])])
def test_interval_counts_validations(tmp_path, interval, measured):
    hook = dict(**LAST, interval=interval)
    train_cfg = dict(by_epoch=True, max_epochs=5, val_interval=2)
    _, before, watch = run(tmp_path, False, hook=hook, train_cfg=train_cfg)
    changed = [
        epoch
        for epoch, (old, new) in enumerate(zip(before.after, watch.after), 1)
        if not torch.equal(old[1]['norm.running_mean'], new[1]['norm.running_mean'])
    ]
    assert changed == measured


def test_iterations(tmp_path):
    train_cfg = dict(by_epoch=False, max_iters=6, val_interval=3)
    sampler = dict(type='InfiniteSampler', shuffle=True)
    runner, _, watch = run(
        tmp_path,
        False,
        batches=2,
        train_cfg=train_cfg,
        train_dataloader=dict(loader(**IN_ORDER), sampler=sampler),
        log_processor=dict(by_epoch=False),
    )
    validated = watch.validated
    assert len(validated) == 2
    source = clone(runner.model)
    assert not torch.equal(validated[1]['norm.running_mean'], source['norm.running_mean'])


def test_validation_follows_as_in_mmengine(tmp_path):
    # MMEngine's own loop is the reference.
    train_cfg = dict(
        by_epoch=True, max_epochs=11, val_begin=3, val_interval=4, dynamic_intervals=[(8, 1)]
    )
    runner = plain_runner(tmp_path, [], train_cfg=train_cfg)
    expected = []
    loop = runner.train_loop

    class Note(Hook):
        def before_val(self, runner):
            expected.append(runner.epoch)

    runner.register_hook(Note())
    runner.train()
    assert expected == [n for n in range(1, 12) if validation_follows(loop, n)]


def test_layers_without_data_keep_theirs_and_are_named(tmp_path, capfd):
    run(tmp_path, False, epochs=1)
    log = capfd.readouterr().out + ''.join(p.read_text() for p in tmp_path.rglob('*.log'))
    assert 'the statistics of 1 BatchNorm layers of the average on 2 training batches' in log
    assert "1 more keep theirs: no data reached them in forward(mode='tensor')" in log


def test_frozen_layers_stay(tmp_path):
    class NormEval(NormModel):
        def train(self, mode=True):
            super().train(mode)
            self.unused.eval()
            return self

    model = NormEval()
    _, before, watch = run(tmp_path, False, epochs=1, model=model)
    old, new = before.after[0][1], watch.after[0][1]
    assert torch.equal(old['unused.running_mean'], new['unused.running_mean'])
    assert not torch.equal(old['norm.running_mean'], new['norm.running_mean'])


def test_an_average_that_is_not_finite_keeps_its_statistics(tmp_path):
    class Poison(Hook):
        priority = 66

        def after_train_epoch(self, runner):
            ema_hook_of(runner).ema_model.module.linear.weight.fill_(float('nan'))

    before, watch = WatchBefore(), Watch()
    plain_runner(tmp_path, [ema(), before, Poison(), LAST, watch], epochs=1).train()
    for key in STATISTICS:
        assert torch.equal(before.after[0][1][key], watch.after[0][1][key])


class NoNorm(NormModel):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.Identity()
        self.unused = torch.nn.Identity()


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(hooks=[LAST]), 'the run must have one EMAHook'),
        (dict(model=NoNorm()), 'no BatchNorm whose running statistics'),
        (dict(val_cfg=None, val_dataloader=None, val_evaluator=None), 'this run has none'),
        (dict(hooks=[ema(priority='VERY_LOW'), LAST]), 'EMAHook comes after it'),
        (
            dict(hooks=[ema(), dict(**LAST, priority='LOWEST')]),
            'CheckpointHook comes before',
        ),
    ],
)
def test_refused_at_the_start(tmp_path, change, message):
    runner = plain_runner(tmp_path, **{'hooks': [ema(), LAST], **change})
    with pytest.raises(ValueError, match=message):
        runner.train()


def test_several_optimizers_are_refused_at_the_start(tmp_path):
    model = NormModel()
    wrapper = build_optim_wrapper(model, dict(optimizer=dict(type='SGD', lr=0.1)))
    several = dict(optim_wrapper=OptimWrapperDict(all=wrapper), model=model)
    runner = plain_runner(tmp_path, [ema(), LAST], **several)
    with pytest.raises(ValueError, match='but OptimWrapperDict has none. Leave the hook out'):
        runner.train()


def test_a_loader_that_is_no_config_is_refused(tmp_path):
    runner = plain_runner(tmp_path, [ema(), LAST])
    built = runner.build_dataloader(copy.deepcopy(loader()))
    runner = plain_runner(tmp_path, [ema(), LAST], train_dataloader=built)
    with pytest.raises(ValueError, match='must be a config .* got a DataLoader'):
        runner.train()


@pytest.mark.parametrize(
    'arguments, error, message',
    [
        (dict(batches=0), ValueError, 'batches must be at least 1, got 0'),
        (dict(batches=True), TypeError, 'batches must be an integer, got True'),
        (dict(interval=1.5), TypeError, 'interval must be an integer, got 1.5'),
        (dict(mode=None), TypeError, 'mode must be a string'),
    ],
)
def test_arguments(arguments, error, message):
    from mmema import EMARecalibrateHook

    with pytest.raises(error, match=message):
        EMARecalibrateHook(**arguments)


@pytest.mark.slow
def test_a_real_detector(tmp_path):
    import make_digits
    from mmengine.config import Config

    root = Path(__file__).resolve().parents[2]

    make_digits.make_digits(tmp_path / 'set', train=8, val=4, test=1)
    config = Config.fromfile(root / 'configs' / 'digits' / 'yolov5_n_digits.py')
    config.work_dir = str(tmp_path / 'work')
    config.visualizer.name = str(tmp_path)
    for loader_config in (config.train_dataloader, config.val_dataloader):
        loader_config.dataset.data_root = f'{tmp_path}/set/'
        loader_config.update(batch_size=4, num_workers=0, persistent_workers=False)
    config.train_dataloader.sampler.shuffle = False
    # Nothing random, so that the batches can be made once more below.
    config.train_dataloader.dataset.pipeline = [*config.digits_load, config.digits_pack]
    config.val_evaluator.ann_file = f'{tmp_path}/set/annotations/val.json'
    config.test_dataloader = config.test_evaluator = config.test_cfg = None
    config.train_cfg.update(max_epochs=1, val_interval=1)
    config.custom_hooks = [ema(ema_type=config.digits_ema.ema_type), dict(**LAST)]
    runner = Runner.from_cfg(config)
    runner.train()

    model = ema_hook_of(runner).ema_model.module.train()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert len(norms) == 57
    saved = torch.load(tmp_path / 'work' / 'epoch_1.pth', weights_only=False)['state_dict']
    measured = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    seen = {norm: [] for norm in norms}
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, inputs: seen[m].append(inputs[0].double()))
    with torch.no_grad():
        for batch in runner.train_dataloader:
            model(**model.data_preprocessor(batch, True), mode='tensor')
    for norm, (mean, variance) in zip(norms, measured):
        means = torch.stack([x.mean((0, 2, 3)) for x in seen[norm]]).mean(0)
        variances = torch.stack([x.var((0, 2, 3)) for x in seen[norm]]).mean(0)
        torch.testing.assert_close(mean.double(), means, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(variance.double(), variances, rtol=1e-3, atol=1e-6)
    name = next(n for n, m in model.named_modules() if m is norms[-1])
    assert torch.equal(saved[f'{name}.running_mean'], measured[-1][0])


class Scaled(NormModel):
    """Has a plain number that a hook changes, as a warm-up of LoRA does (YOLO-Master 211)."""

    scale = 0.0

    def forward(self, x, y=None, mode='tensor'):
        self.last = x  # an attribute that a pass changes
        return super().forward(x + self.scale, y, mode)


class WarmUp(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        runner.model.scale = 3.0


@pytest.mark.parametrize('ema_hook', ['EMAHook', 'mmema.EMAHook'])
@pytest.mark.parametrize('device', [None, 'cpu'])
def test_the_model_as_it_is_now_is_measured(tmp_path, ema_hook, device):
    before, watch = WatchBefore(), Watch()
    hooks = [ema(type=ema_hook, device=device), WarmUp(), before, watch, LAST]
    data = loader(**IN_ORDER)
    runner = plain_runner(tmp_path, hooks, model=Scaled(), train_dataloader=data)
    runner.train()
    average = watch.after[-1][1]
    samples = Line(8).x + 3
    mean, variance = by_hand(average, [samples[:4], samples[4:]])
    torch.testing.assert_close(average['norm.running_mean'], mean)
    torch.testing.assert_close(average['norm.running_var'], variance)
    source_before, source = before.after[-1][0], watch.after[-1][0]
    assert all(torch.equal(source[key], source_before[key]) for key in source)


@pytest.mark.parametrize('ema_hook', ['EMAHook', 'mmema.EMAHook'])
def test_a_forward_that_is_compiled_by_attribute(tmp_path, ema_hook):
    # The copy of such a model calls the training model, whose counters then changed.
    model = NormModel()
    model.forward = torch.compile(model.forward, backend='eager')
    data = loader(**IN_ORDER)
    runner, before, watch = run(
        tmp_path, False, ema_hook=ema_hook, model=model, train_dataloader=data
    )
    (source_before, _), (source, average) = before.after[-1], watch.after[-1]
    samples = Line(8).x
    mean, _ = by_hand(average, [samples[:4], samples[4:]])
    torch.testing.assert_close(average['norm.running_mean'], mean)
    assert all(torch.equal(source[key], source_before[key]) for key in source)


def test_a_pass_that_writes_everywhere_leaves_the_model_as_it_was(tmp_path):
    class Writes(NormModel):
        def forward(self, x, y=None, mode='tensor'):
            if mode == 'loss' and not torch.is_grad_enabled():
                self.linear.weight.add_(1)  # as a momentum encoder
                self.passes = self.passes + 7
                self.register_buffer('new', torch.ones(1))
                self.number = 5
            return super().forward(x, y, mode)

    hook = dict(LAST, mode='loss')
    model = Writes()
    _, before, watch = run(tmp_path, False, hook=hook, model=model)
    source_before, source = before.after[-1][0], watch.after[-1][0]
    assert all(torch.equal(source[key], source_before[key]) for key in source)
    assert set(source) == set(source_before) and not hasattr(model, 'number')
