"""Averages made from checkpoints, against sums of the recorded raw weights in float64."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.runner import load_checkpoint
from recorded import STOCK, parameters, record, shares_of
from reference import assert_close, exp_momentum
from runs import LineModel, ema_of

from mmema.checkpoints.formats import CheckpointError
from mmema.posthoc.derive import fit, mean, restart
from mmema.posthoc.facts import facts_in
from mmema.posthoc.history import Given, momenta_between
from mmema.posthoc.profiles import Kind, exponential, stored_profiles, uniform
from mmema.posthoc.profiles import fit as fit_profiles

LENGTH = 4  # iterations of an epoch


def exp_momenta(updates, momentum, gamma, first=0):
    return [exp_momentum(t, momentum, gamma) if t else 1.0 for t in range(first, first + updates)]


def window(momenta, begin):
    """Return the shares of all updates from index ``begin`` on, of an average of these alone."""
    shares = shares_of(momenta)[begin:]
    return [0] * begin + [share / sum(shares) for share in shares]


def raw_state(run, iteration):
    return run.states[iteration - 1]


def without_record(file):
    """Return the file as mmema 0.1.0 wrote it, in a folder beside it."""
    content = torch.load(file, weights_only=True)
    for state in (content['ema_state_dict'], *content.get('ema_also', {}).values()):
        state.pop('record', None)
        state.get('state_dict', {}).pop('record', None)
    old = Path(file).parent / 'old' / Path(file).name
    old.parent.mkdir(exist_ok=True)
    torch.save(content, old)
    return old


STOCKS = {
    'mmengine': (dict(ema_type='ExponentialMovingAverage', momentum=0.1), lambda t: 0.1),
    'mmengine_annealing': (
        dict(ema_type='MomentumAnnealingEMA', momentum=0.1, gamma=2),
        lambda t: max(0.1, 2 / (2 + t)),
    ),
    'mmengine_swa': (dict(ema_type='StochasticWeightAverage'), lambda t: 1 / (t + 1)),
    'mmdet': (
        dict(ema_type='mmdet.ExpMomentumEMA', momentum=0.1, gamma=8),
        lambda t: exp_momentum(t, 0.1, 8),
    ),
    'mmyolo': (
        dict(ema_type='mmyolo.ExpMomentumEMA', momentum=0.1, gamma=8),
        lambda t: exp_momentum(t, 0.1, 8),
    ),
    'interval': (
        dict(ema_type='ExponentialMovingAverage', momentum=0.3, interval=3),
        lambda t: 0.0 if t % 3 else 0.3,
    ),
    'swa_interval': (
        dict(ema_type='StochasticWeightAverage', interval=3),
        lambda t: 0.0 if t % 3 else 1 / (t // 3 + 1),
    ),
}


@pytest.mark.parametrize('name', STOCKS)
def test_restart_of_a_stock_average(name, tmp_path):
    settings, momentum = STOCKS[name]
    run = record(tmp_path, dict(type='EMAHook', **settings))
    momenta = [momentum(t) if t else 1.0 for t in range(6 * LENGTH)]
    made = restart(run.file(2), run.file(6))
    expected = run.sum(window(momenta, 2 * LENGTH))
    assert_close(parameters(made.state), parameters(expected))
    kept = math.prod(1 - m for m in momenta[2 * LENGTH :])
    assert made.meta['mmema']['kept'] == pytest.approx(kept)
    assert 0 < kept < 0.99
    assert made.meta['mmema']['steps'] == 4 * LENGTH
    # Copied buffers are the source's, in MMYOLO's class too, whose average leaves them behind.
    raw = raw_state(run, 24)
    for buffer in ('norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked', 'calls'):
        assert torch.equal(made.state[buffer].to(raw[buffer].dtype), raw[buffer]), buffer
    told = any('statistics' in text for _, text in made.lines)
    assert told == (name == 'mmyolo')


@pytest.mark.parametrize('kind', ['mmdet.ExpMomentumEMA', 'mmyolo.ExpMomentumEMA'])
def test_blended_buffers_are_treated_as_parameters(kind, tmp_path):
    run = record(tmp_path, {**STOCK, 'ema_type': kind, 'update_buffers': True})
    made = restart(run.file(2), run.file(6))
    expected = run.sum(window(exp_momenta(24, 0.1, 8), 8))
    expected.update({n: t for n, t in raw_state(run, 24).items() if not t.is_floating_point()})
    assert_close(made.state, expected)


class TiedModel(LineModel):
    """Two of three layers have the same weight, as the heads of RTMDet for several levels."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x, y=None, mode='tensor'):
        return (
            super().forward(x, y, mode)
            if mode != 'loss'
            else dict(loss=(self.layers(self.norm(x)) - y).square().mean())
        )


@pytest.mark.parametrize('update_buffers', [False, True])
def test_tied_tensors_are_blended_once_for_each_name_by_stock_classes(update_buffers, tmp_path):
    hook = {**STOCK, 'update_buffers': update_buffers}
    run = record(tmp_path, hook, model=TiedModel())
    made = restart(run.file(2), run.file(6))
    once = exp_momenta(24, 0.1, 8)
    times = 2 if update_buffers else 1
    tied = [1 - (1 - m) ** times for m in once]
    expected = parameters(run.sum(window(once, 8)))
    for name in ('layers.0.weight', 'layers.2.weight'):
        expected[name] = run.sum(window(tied, 8))[name]
    assert_close(parameters(made.state), expected)
    told = any('tensors are tied' in text for _, text in made.lines)
    assert told == update_buffers


def test_a_fit_of_tied_tensors(tmp_path):
    """Their profiles are others, so they have coefficients of their own."""
    run = record(tmp_path, {**STOCK, 'update_buffers': True}, model=TiedModel())
    stored, _ = stored_profiles([facts_in(run.file(epoch)) for epoch in (2, 3, 4, 5, 6)])
    wanted = exponential(0.15, None, 8, 24)
    made, found = fit(stored, wanted, force=True)
    tied = fit_profiles([one.profile(Kind(2)) for one in stored], wanted)
    assert abs(tied.coefficients - found.coefficients).max() > 0.01
    expected = parameters(run.sum(found.profile))
    for name in ('layers.0.weight', 'layers.2.weight'):
        expected[name] = run.sum(tied.profile)[name]
    assert_close(parameters(made.state), expected, rtol=1e-5, atol=1e-5)
    made, _ = fit(stored, uniform(8, 24), force=True)
    assert made.meta['mmema']['error'] > 0.05


def test_the_written_file_is_evaluated_as_the_average(stock, tmp_path):
    made = restart(stock.file(2), stock.file(6))
    out = made.write(tmp_path / 'out.pth')
    model = LineModel(seed=5)
    load_checkpoint(model, str(out), strict=True)
    assert_close(model.state_dict(), {n: t.double() if t.is_floating_point() else t
                                      for n, t in made.state.items()})  # fmt: skip
    about = torch.load(out, weights_only=True)['meta']['mmema']
    assert about == {
        'weights': 'ema',
        'steps': 16,
        'made': 'restart',
        'after': 'epoch 2',
        'at': 'epoch 6',
        'kept': pytest.approx(math.prod(1 - m for m in exp_momenta(16, 0.1, 8, first=8))),
    }


# --- ours ---------------------------------------------------------------------------------------


def our_momenta(updates=24):
    """Return those of the main average of `ours`: a soft restart to 2 before epoch 3."""
    before = exp_momenta(12, 0.15, 3)
    return (before + exp_momenta(12, 0.3, 3, first=2))[:updates]


@pytest.mark.parametrize('before, after', [(1, 3), (4, 6), (2, 5)])
def test_restart_sees_through_a_soft_restart_of_ours(ours, before, after):
    made = restart(ours.file(before), ours.file(after))
    momenta = our_momenta(after * LENGTH)
    expected = ours.sum(window(momenta, before * LENGTH))
    assert_close(parameters(made.state), parameters(expected))
    old = restart(without_record(ours.file(before)), without_record(ours.file(after)))
    assert_close(old.state, {n: t.double() if t.is_floating_point() else t
                             for n, t in made.state.items()})  # fmt: skip


def test_after_a_hard_restart_the_later_average_is_the_result(ours):
    made = restart(ours.file(1), ours.file(5), 'restarted')
    momentum = 0.15
    debiased = [momentum / (1 - (1 - momentum) ** (n + 1)) for n in range(3 * LENGTH)]
    expected = ours.sum([0] * (2 * LENGTH) + shares_of(debiased))
    assert_close(parameters(made.state), parameters(expected))
    assert made.meta['mmema']['kept'] == 0
    assert any('its own restarted weights are the result' in text for _, text in made.lines)


def test_restart_of_an_average_in_also_with_interval_and_blended_buffers(ours):
    made = restart(ours.file(1), ours.file(2), 'sparse')
    momenta = [1.0] + [0.0 if t % 3 else exp_momentum(t, 0.15, 3) for t in range(1, 8)]
    expected = ours.sum(window(momenta, 4))
    expected.update({n: t for n, t in raw_state(ours, 8).items() if not t.is_floating_point()})
    assert_close(made.state, expected)


def test_restart_equals_the_average_that_was_restarted_in_the_same_run(tmp_path):
    hook = dict(
        type='mmema.EMAHook',
        ema_type='mmema.RestartableConstantEMA',
        momentum=0.1,
        also=dict(r=dict(ema_type='mmema.RestartableDebiasedEMA', restart=dict(milestones=[3]))),
    )
    run = record(tmp_path, hook)
    made = restart(run.file(3), run.file(6))
    own = run.runner.hooks
    real = next(h.also['r'] for h in own if hasattr(h, 'also')).module.state_dict()
    assert_close(made.state, {n: t.double() if t.is_floating_point() else t
                              for n, t in real.items()}, rtol=1e-5)  # fmt: skip
    main = ema_of(run.runner).module.state_dict()
    assert not torch.allclose(main['layers.0.weight'], real['layers.0.weight'], rtol=1e-3)


def test_updates_are_counted_where_gradients_are_accumulated(tmp_path):
    accumulating = dict(optimizer=dict(type='SGD', lr=0.05), accumulative_counts=2)
    ema = dict(type='mmema.EMAHook', momentum=0.2, gamma=2)
    hook = dict(type='mmema.EMARestartHook', milestones=[3], steps=1, gamma=4)
    run = record(tmp_path, ema, hook, optim_wrapper=accumulating)
    momenta = exp_momenta(6, 0.2, 2) + exp_momenta(6, 0.2, 4, first=1)
    each = window(momenta, 4)
    made = restart(run.file(2), run.file(6))
    expected = run.sum([share for pair in zip([0] * 12, each) for share in pair])
    assert_close(parameters(made.state), parameters(expected))
    assert made.meta['mmema']['steps'] == 8


# --- refusals -----------------------------------------------------------------------------------


def refuses(match):
    return pytest.raises(CheckpointError, match=match)


def test_files_in_the_wrong_order_or_twice_are_refused(stock):
    with refuses(r'must be earlier in the run than .*epoch_2.pth, but it is of iteration 24'):
        restart(stock.file(6), stock.file(2))
    with refuses('must be earlier in the run'):
        restart(stock.file(6), stock.file(6))


def test_files_of_two_runs_are_refused(stock, tmp_path):
    other = record(tmp_path / 'a', STOCK, epochs=3, randomness=dict(seed=1))
    with refuses('must be of one run, but their seeds are 0 and 1'):
        restart(stock.file(2), other.file(3))
    model = LineModel(seed=3)
    fork = record(tmp_path / 'b', STOCK, epochs=3, model=model)
    with refuses('must be of one run, but their losses differ from iteration 1 on'):
        restart(stock.file(2), fork.file(3))


def test_files_of_two_models_are_refused(stock, tmp_path):
    from runs import NormModel

    other = record(tmp_path, STOCK, epochs=3, model=NormModel())
    with refuses("must have weights of one model, but differ in 'passes', 'linear.weight'"):
        restart(stock.file(2), other.file(3))


def test_too_much_of_before_is_refused(tmp_path):
    ema = dict(type='EMAHook', ema_type='ExponentialMovingAverage', momentum=0.002)
    run = record(tmp_path, ema, epochs=3)
    with refuses(r'99.20% of the average in .*epoch_3.pth is that of .*epoch_2.pth, .* 4 updates'):
        restart(run.file(2), run.file(3))


def test_what_the_files_do_not_say_has_to_be_given(stock, tmp_path):
    content = torch.load(stock.file(2), weights_only=True)
    files = []
    for epoch in (2, 6):
        content = torch.load(stock.file(epoch), weights_only=True)
        content['meta']['cfg'] = ''
        files.append(tmp_path / f'{epoch}.pth')
        torch.save(content, files[-1])
    with refuses(
        r'its config has no EMAHook\); `restart` takes --ema-type .ema_type of Given., one of '
    ):
        restart(*files)
    with refuses('`restart` takes --momentum and --gamma and --interval'):
        restart(*files, given=Given('ExpMomentumEMA'))
    made = restart(*files, given=Given('mmdet.ExpMomentumEMA', 0.1, 8, 1))
    expected = stock.sum(window(exp_momenta(24, 0.1, 8), 8))
    assert_close(parameters(made.state), parameters(expected))
    with refuses(r"\(ema_type\) must be one of .*, got 'Exp'"):
        restart(*files, given=Given('Exp'))
    with refuses('RestartableConstantEMA has no gamma, got 8'):
        restart(*files, given=Given('ExponentialMovingAverage', 0.1, 8, 1))
    with refuses(r'momentum must be in \(0, 1\), got 2'):
        restart(*files, given=Given('ExponentialMovingAverage', 2.0, interval=1))
    with refuses('says that momentum of ema is 0.1, got 0.2'):
        restart(stock.file(2), stock.file(6), given=Given(momentum=0.2))
    with refuses('says that ema is a RestartableExpMomentumEMA, got Stoch'):
        restart(stock.file(2), stock.file(6), given=Given('StochasticWeightAverage'))


def test_a_config_that_was_changed_on_the_way_is_refused(stock, tmp_path):
    content = torch.load(stock.file(6), weights_only=True)
    content['meta']['cfg'] = content['meta']['cfg'].replace('momentum=0.1', 'momentum=0.2')
    torch.save(content, tmp_path / 'changed.pth')
    with refuses(
        r'momentum of ema must be the same in the configs of .*, got 0.1 and 0.2: when it'
    ):
        restart(stock.file(2), tmp_path / 'changed.pth')


def test_an_average_of_sixteen_bits_is_refused(stock, tmp_path):
    files = []
    for epoch in (2, 6):
        content = torch.load(stock.file(epoch), weights_only=True)
        for state in (content['state_dict'], content['ema_state_dict']):
            state.update({n: t.half() for n, t in state.items() if t.is_floating_point()})
        files.append(tmp_path / f'{epoch}.pth')
        torch.save(content, files[-1])
    with refuses("an average must be of 32 bits, got torch.float16 for 'layers.0.bias', "):
        restart(*files)


def test_what_a_restart_by_hand_did_is_recorded_and_never_guessed(tmp_path):
    run = record(tmp_path, dict(type='mmema.EMAHook', momentum=0.2, gamma=3), epochs=2)
    runner, ema = run.runner, ema_of(run.runner)
    ema.restart(steps=5)
    runner.save_checkpoint(str(tmp_path), 'restarted.pth', meta=dict(epoch=2, iter=9))
    content = torch.load(tmp_path / 'restarted.pth', weights_only=True)
    content['message_hub']['log_scalars'] = {}
    torch.save(content, tmp_path / 'restarted.pth')
    made = restart(run.file(1), tmp_path / 'restarted.pth')  # no update came after it
    assert_close(parameters(made.state), parameters(run.sum(window(exp_momenta(8, 0.2, 3), 4))))
    old = [without_record(file) for file in (run.file(1), tmp_path / 'restarted.pth')]
    with refuses(r'changed the average ema that .*restarted.pth does not explain \(updates 9 inst'):
        restart(*old)
    with refuses('epoch_1.pth has no record of the updates of ema, and .*restarted.pth has'):
        restart(old[0], tmp_path / 'restarted.pth')


def test_a_restart_that_was_late_is_counted_from_where_it_was_done(tmp_path):
    hook = dict(type='mmema.EMAHook', ema_type='mmema.RestartableConstantEMA', momentum=0.1)
    rule = dict(type='mmema.EMARestartHook', milestones=[2], steps=None, momentum=0.4)
    first = record(tmp_path, hook, epochs=4)
    late = record(tmp_path, hook, rule, resume=True)  # before epoch 4, instead of 2
    momenta = [0.1] * 16 + [0.4] * 8
    late.states[:0] = first.states
    made = restart(first.file(1), late.file(6))
    kept = math.prod(1 - m for m in momenta[LENGTH:])
    assert made.meta['mmema']['kept'] == pytest.approx(kept, rel=1e-12)
    expected = late.sum(window(momenta, LENGTH))
    assert_close(parameters(made.state), parameters(expected), rtol=1e-4, atol=1e-5)
    old = [without_record(file) for file in (first.file(1), late.file(6))]
    assert restart(*old).meta['mmema']['kept'] == pytest.approx(kept, rel=1e-12)
    # A state of an earlier version does not say when.
    content = torch.load(old[1], weights_only=True)
    del content['ema_restart'][0]['done_at']
    torch.save(content, old[1])
    with refuses(r'epoch_6.pth has a restart rule that .*epoch_1.pth lacks, and does not say when'):
        restart(*old)


def test_a_momentum_scaled_by_the_batch_is_not_the_configs(tmp_path):
    kind = 'mmema.RestartableConstantEMA'
    hook = dict(type='mmema.EMAHook', ema_type=kind, momentum=0.1, base_batch_size=3)
    rule = dict(type='mmema.EMARestartHook', milestones=[2], steps=None, momentum=0.4)
    run = record(tmp_path, hook, rule, epochs=3)  # batches of 6
    assert len(momenta_between(facts_in(run.file(1)), facts_in(run.file(3)))) == 2 * LENGTH
    with refuses('does not say how its average ema was updated; `restart` takes --momentum '):
        momenta_between(None, facts_in(run.file(3)))
    scaled = 1 - 0.9**2
    momenta = momenta_between(None, facts_in(run.file(3)), given=Given(momentum=scaled))
    assert momenta == pytest.approx([1] + [scaled] * 7 + [0.4] * 4)


def test_a_run_without_an_average_and_other_files_are_refused(stock, tmp_path):
    content = torch.load(stock.file(2), weights_only=True)
    del content['ema_state_dict']
    torch.save(content, tmp_path / 'none.pth')
    with refuses(r"none.pth has no average 'ema' with its counter"):
        restart(tmp_path / 'none.pth', stock.file(6))
    with refuses("has no average 'short' with its counter; it has ema"):
        restart(stock.file(2), stock.file(6), 'short')
    torch.save(LineModel().state_dict(), tmp_path / 'bare.pth')
    with refuses('bare.pth: it is not the checkpoint of an MMEngine run'):
        restart(tmp_path / 'bare.pth', stock.file(6))
    whole = Path(stock.file(2)).read_bytes()
    (tmp_path / 'cut.pth').write_bytes(whole[: len(whole) // 2])
    with refuses('cut.pth: it is damaged, cut short or no checkpoint'):
        restart(tmp_path / 'cut.pth', stock.file(6))


# --- means --------------------------------------------------------------------------------------


def test_mean_of_raw_and_averaged_weights(stock, tmp_path):
    made = mean([stock.file(epoch) for epoch in (4, 5, 6)])
    shares = [0.0] * 24
    for epoch in (4, 5, 6):
        shares[epoch * LENGTH - 1] = 1 / 3
    expected = stock.sum(shares)
    expected.update({n: t for n, t in raw_state(stock, 24).items() if not t.is_floating_point()})
    assert_close(made.state, expected)
    assert any('mmema recalibrate' in text for _, text in made.lines)
    made = mean([stock.file(5), stock.file(6)], 'ema')
    both = [torch.load(stock.file(e), weights_only=True)['state_dict'] for e in (5, 6)]
    weight = made.state['layers.0.weight']
    torch.testing.assert_close(
        weight, (both[0]['layers.0.weight'] + both[1]['layers.0.weight']) / 2
    )
    assert made.meta['mmema'] == {
        'weights': 'mean of ema',
        'made': 'mean',
        'of': ['epoch_5.pth', 'epoch_6.pth'],
    }


def test_means_that_are_none_are_refused(stock, tmp_path):
    with refuses('a mean is of at least two files, each once, got '):
        mean([stock.file(2)])
    with refuses('a mean is of at least two files, each once, got '):
        mean([stock.file(2), stock.file(2)])
    with refuses('epoch_2.pth has no short weights; it has ema, raw'):
        mean([stock.file(2), stock.file(3)], 'short')
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / 'other.pth')
    with refuses('other.pth must have weights of one model, but '):
        mean([stock.file(2), tmp_path / 'other.pth'])
