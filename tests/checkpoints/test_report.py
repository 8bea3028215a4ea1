"""Reports on checkpoints: where the weights are, how far apart, and what is not finite."""

import math

import pytest
import torch
from marks import SINCE_TORCH_2_6
from runs import make_runner
from samples import pair, same

from mmema.checkpoints.convert import convert
from mmema.checkpoints.export import export
from mmema.checkpoints.formats import CheckpointError
from mmema.checkpoints.report import inspect
from mmema.hooks.monitor import relative_distance
from mmema.run import ema_hook_of

pytestmark = SINCE_TORCH_2_6


def test_inspect_a_run_with_our_average(run):
    runner, average, file = run
    report = inspect(file)
    found = report.weights
    same(found.average, average.module.state_dict())
    same(found.raw, runner.model.state_dict())
    assert (found.steps, int(found.live['restarts'])) == (4, 1)
    assert found.live['momentum'].item() == 0.3
    assert found.live['gamma'].item() == 3.0
    assert 'MMEngine 0.10' in found.maker
    lines = dict(report.lines())
    assert lines['updates'] == '4'
    shown = [lines[name] for name in ('schedule', 'momentum', 'gamma', 'restarts')]
    assert shown == ['exp', '0.3', '3', '1']
    assert not any(label.startswith('changed') for label in lines)
    assert lines['EMA weights'].startswith('state_dict: ')
    assert lines['raw weights'].startswith("ema_state_dict['module.*']: ")
    assert lines['NaN or infinity'] == 'none'


def test_a_state_of_0_1_0_is_inspected(run, tmp_path):
    content = torch.load(run[2], weights_only=True)
    state = content['ema_state_dict']
    for key in ('schedule', 'changed.momentum', 'changed.gamma'):
        del state[key]
    state['changed'] = torch.tensor([True, False])
    torch.save(content, tmp_path / 'x.pth')
    lines = dict(inspect(tmp_path / 'x.pth').lines())
    assert (lines['momentum'], lines['gamma'], lines['restarts']) == ('0.3', '3', '1')
    assert 'schedule' not in lines and 'changed' not in lines


def test_inspect_lists_every_average(run_of_several, tmp_path):
    content = torch.load(run_of_several[1], weights_only=True)
    state = content['ema_also']['mean']['state_dict']
    state['module.norm.weight'][1] = math.nan
    torch.save(content, tmp_path / 'x.pth')
    report = inspect(tmp_path / 'x.pth')
    raw, short = run_of_several[0].model, ema_hook_of(run_of_several[0]).also['short'].module
    by_hand = relative_distance(short, raw)  # over the parameters
    assert report.distances['short'] == pytest.approx(by_hand, rel=1e-6)
    lines = dict(report.lines())
    expected = f'updates 8, schedule exp, restarts 0, momentum 0.5, gamma 5, distance {by_hand:.3g}'
    assert lines['also short'] == expected
    values = 'updates 4, schedule exp, restarts 1, momentum 0.1, gamma 7, distance '
    assert lines['also restarted'].startswith(values)
    assert lines['also mean'] == 'updates 8, schedule uniform, restarts 0, distance nan'
    assert lines['NaN or infinity'] == "also mean: 'norm.weight'"
    notes = convert(tmp_path / 'x.pth', tmp_path / 'y.pth')
    assert notes == ["left out, since they are not the main average: 'short', 'restarted', 'mean'"]


def test_distance_by_hand(tmp_path):
    raw = {'a': torch.tensor([3.0, 0.0]), 'b': torch.tensor([4.0]), 'n': torch.tensor(5)}
    average = {'a': torch.tensor([3.0, 3.0]), 'b': torch.tensor([8.0]), 'n': torch.tensor(9)}
    raw['bn.running_var'], average['bn.running_var'] = torch.tensor([1e6]), torch.tensor([0.0])
    torch.save({'model': raw, 'ema': {'module': average, 'updates': 7}}, tmp_path / 'x.pth')
    report = inspect(tmp_path / 'x.pth')
    assert report.distance == pytest.approx(1.0)  # sqrt(3^2 + 4^2) / sqrt(3^2 + 4^2)


def test_non_finite_tensors_are_named(tmp_path):
    average, raw = pair()
    average['norm.weight'][1] = math.nan
    raw['conv.bias'][0] = math.inf
    torch.save({'model': raw, 'ema': {'module': average, 'updates': 7}}, tmp_path / 'x.pth')
    report = inspect(tmp_path / 'x.pth')
    assert report.non_finite == {'average': ['norm.weight'], 'raw': ['conv.bias']}
    assert ('NaN or infinity', "average: 'norm.weight'") in report.lines()
    assert ('NaN or infinity', "raw: 'conv.bias'") in report.lines()


def test_distance_of_zeros(tmp_path):
    def distance(average, raw):
        content = {'model': {'a': raw}, 'ema': {'module': {'a': average}, 'updates': 7}}
        torch.save(content, tmp_path / 'x.pth')
        return inspect(tmp_path / 'x.pth').distance

    assert distance(torch.zeros(2), torch.zeros(2)) == 0
    assert distance(torch.ones(2), torch.zeros(2)) == math.inf


def test_a_state_without_steps_is_reported(run, tmp_path):
    # MMEngine 0.10.7 loads such a state in silence, and the next update replaces the average
    content = torch.load(run[2], weights_only=True)
    del content['ema_state_dict']['steps']
    torch.save(content, tmp_path / 'x.pth')
    found = inspect(tmp_path / 'x.pth').weights
    assert found.steps is None
    same(found.raw, run[0].model.state_dict())
    assert any('lacks `steps`' in note for note in found.notes)


def test_tensors_missing_in_the_ema_state_are_reported(run, tmp_path):
    content = torch.load(run[2], weights_only=True)
    del content['ema_state_dict']['module.layers.0.weight']
    torch.save(content, tmp_path / 'x.pth')
    notes = inspect(tmp_path / 'x.pth').weights.notes
    assert any('lacks 1 of' in note and 'layers.0.weight' in note for note in notes)


def test_a_run_without_ema(tmp_path):
    runner = make_runner(tmp_path, epochs=1)
    runner._hooks = [h for h in runner.hooks if type(h).__name__ not in ('EMAHook', 'Clock')]
    runner.cfg.pop('custom_hooks', None)
    runner.train()
    report = inspect(tmp_path / 'epoch_1.pth')
    assert report.weights.average is None
    same(report.weights.raw, runner.model.state_dict())
    assert 'a run without EMAHook' in dict(report.lines())['note']
    with pytest.raises(CheckpointError, match='no ema weights .*; it has raw$'):
        export(tmp_path / 'epoch_1.pth', tmp_path / 'out.pth')
