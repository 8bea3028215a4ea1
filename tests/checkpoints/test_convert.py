"""Checkpoints of other training codes, made into ones that an MMEngine run resumes from."""

import pytest
import torch
from marks import SINCE_TORCH_2_6
from mmengine.hooks import Hook
from mmengine.model import ExponentialMovingAverage, MomentumAnnealingEMA
from runs import EMA, ema_of, make_runner
from samples import KINDS, WITHOUT_RAW, WITHOUT_STEPS, files_of_others, load_state, pair, same
from toys import Toy, seeded, shake

from mmema import ExpMomentumEMA, RestartableAnnealingEMA, RestartableExpMomentumEMA
from mmema.checkpoints.convert import convert
from mmema.checkpoints.export import export
from mmema.checkpoints.files import load
from mmema.checkpoints.formats import CheckpointError
from mmema.checkpoints.report import inspect

pytestmark = SINCE_TORCH_2_6


def averages_of_others():
    yield ExponentialMovingAverage
    yield MomentumAnnealingEMA
    yield ExpMomentumEMA
    yield RestartableExpMomentumEMA
    mmdet = pytest.importorskip('mmdet.models.layers')
    yield mmdet.ExpMomentumEMA
    mmyolo = pytest.importorskip('mmyolo.models.layers')
    yield mmyolo.ExpMomentumEMA


@pytest.mark.parametrize('number', range(6))
@pytest.mark.parametrize('update_buffers', [False, True])
def test_states_of_all_ema_classes_are_read_and_go_into_ours(tmp_path, number, update_buffers):
    cls = list(averages_of_others())[number]
    model, random = Toy(), seeded(0)
    average = cls(model, momentum=0.1, update_buffers=update_buffers)
    for _ in range(3):
        shake(model, random)
        average.update_parameters(model)
    torch.save(average.state_dict(), tmp_path / 'state.pth')
    found = load(tmp_path / 'state.pth')
    same(found.average, average.module.state_dict())
    assert found.steps == 3
    assert bool(found.live) == (cls is RestartableExpMomentumEMA)

    convert(tmp_path / 'state.pth', tmp_path / 'ours.pth')
    content = torch.load(tmp_path / 'ours.pth', weights_only=True)
    ours = RestartableExpMomentumEMA(model, momentum=0.05, gamma=50)
    swap(content)
    ours.load_state_dict(content['ema_state_dict'])
    same(ours.module.state_dict(), average.module.state_dict())
    assert (int(ours.steps), ours.momentum, ours.gamma, ours.restarts) == (3, 0.05, 50, 0)


def swap(content):
    """What EMAHook does when a run is resumed."""
    for name, tensor in content['state_dict'].items():
        key = f'module.{name}'
        content['state_dict'][name] = content['ema_state_dict'][key]
        content['ema_state_dict'][key] = tensor


@pytest.mark.parametrize('kind', KINDS)
def test_every_format_becomes_a_checkpoint_of_ours(tmp_path, kind):
    average, raw = pair()
    torch.save(files_of_others()[kind], tmp_path / 'theirs.pth')
    steps = 123 if kind in WITHOUT_STEPS else None
    notes = convert(tmp_path / 'theirs.pth', tmp_path / 'ours.pth', steps=steps)
    content = torch.load(tmp_path / 'ours.pth', weights_only=True)
    assert int(content['ema_state_dict']['steps']) == 123
    same(content['state_dict'], average)
    same(load(tmp_path / 'ours.pth').raw, average if kind in WITHOUT_RAW else raw)
    assumed = 'no raw weights in the file: training goes on from the average'
    assert (assumed in notes) == (kind in WITHOUT_RAW)


def test_a_runner_goes_on_from_a_converted_file(run, tmp_path):
    """The same next update as the average that was left: real weights and counter."""
    runner, average, file = run
    weights = {'raw': runner.model.state_dict(), 'average': average.module.state_dict()}
    content = {'model': weights['raw'], 'ema': {'module': weights['average'], 'updates': 4}}
    torch.save(content, tmp_path / 'dfine.pth')
    convert(tmp_path / 'dfine.pth', tmp_path / 'ours.pth')
    again = make_runner(
        tmp_path / 'work',
        epochs=1,
        ema={**EMA, 'update_buffers': True, 'momentum': 0.3, 'gamma': 3.0},
        load_from=str(tmp_path / 'ours.pth'),
        resume=True,
    )
    seen = {}

    class Look(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            model = ema_of(runner)
            if not seen:
                seen.update(
                    average={k: v.clone() for k, v in model.module.state_dict().items()},
                    raw={k: v.clone() for k, v in runner.model.state_dict().items()},
                    momentum=model.current_momentum,
                    steps=int(model.steps),
                    epoch=runner.epoch,
                )

    again.register_hook(Look())
    again.train()
    same(seen['average'], average.module.state_dict())
    same(seen['raw'], runner.model.state_dict())
    assert seen['momentum'] == average.current_momentum
    assert (seen['steps'], seen['epoch']) == (4, 0)


def test_stock_classes_load_what_is_converted(run, tmp_path):
    _, average, file = run
    raw, mean = run[0].model.state_dict(), average.module.state_dict()
    torch.save({'model': raw, 'ema': {'module': mean, 'updates': 4}}, tmp_path / 'dfine.pth')
    for number, (theirs, beside) in enumerate(
        [
            (tmp_path / 'dfine.pth', set()),
            (file, {'restarts', 'schedule', 'momentum', 'gamma'}),
        ]
    ):
        assert convert(theirs, tmp_path / f'{number}.pth') == []
        content = torch.load(tmp_path / f'{number}.pth', weights_only=True)
        swap(content)
        stock = ExponentialMovingAverage(run[0].model, update_buffers=True)
        done = stock.load_state_dict(content['ema_state_dict'], strict=False)  # as EMAHook does
        assert done.missing_keys == []
        assert {k for k in done.unexpected_keys if not k.startswith('changed.')} == beside
        same(stock.module.state_dict(), mean)
        assert int(stock.steps) == 4


def test_live_values_of_another_schedule_stay(tmp_path):
    average = RestartableAnnealingEMA(Toy(), momentum=0.1, gamma=7)
    average.restart(momentum=0.2)
    torch.save(average.state_dict(), tmp_path / 'x.pth')
    convert(tmp_path / 'x.pth', tmp_path / 'y.pth')
    again = RestartableAnnealingEMA(Toy(), momentum=0.1, gamma=7)
    again.load_state_dict(torch.load(tmp_path / 'y.pth', weights_only=True)['ema_state_dict'])
    assert (again.momentum, again.gamma, again.restarts) == (0.2, 7, 1)
    assert dict(inspect(tmp_path / 'y.pth').lines())['schedule'] == 'annealing'


def test_torchvision_without_the_raw_weights(tmp_path):
    average, _ = pair()
    content = files_of_others()['torchvision']
    for raw in ('none', 'left out'):
        content['model'] = None
        if raw == 'left out':
            del content['model']
        torch.save(content, tmp_path / 'x.pth')
        found = inspect(tmp_path / 'x.pth').weights
        same(found.average, average)
        assert (found.maker, found.raw, found.steps) == ('torchvision reference', None, 123)
        same(load_state(export(tmp_path / 'x.pth', tmp_path / f'{raw}.pth')), average)
        notes = convert(tmp_path / 'x.pth', tmp_path / 'y.pth', force=True)
        assert any('training goes on from the average' in note for note in notes)


def test_numbers_that_are_missing_or_wrong(tmp_path):
    torch.save(files_of_others()['yolox'], tmp_path / 'x.pth')

    def refused(match, **kwargs):
        with pytest.raises(CheckpointError, match=match):
            convert(tmp_path / 'x.pth', tmp_path / 'y.pth', **kwargs)
        assert not (tmp_path / 'y.pth').exists()

    refused('does not say how many updates .*give steps .--steps N.')
    refused('steps must be at least 0, got -1', steps=-1)


def test_sets_of_weights_that_differ_in_names(tmp_path):
    average, raw = pair()
    del raw['conv.bias']
    torch.save({'model': raw, 'ema': {'module': average, 'updates': 5}}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match="the same names, but 1 differ, such as 'conv.bias'"):
        convert(tmp_path / 'x.pth', tmp_path / 'y.pth')
    assert not (tmp_path / 'y.pth').exists()
