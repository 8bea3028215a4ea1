"""Files of real runs and of other codes: what is in them, and what can be made of them."""

import argparse
import hashlib
import math
import os
import pickle
import warnings
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import ExponentialMovingAverage, MomentumAnnealingEMA
from runs import EMA, ema_of, make_runner
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toys import Toy, seeded, shake

from mmema import ExpMomentumEMA, RestartableExpMomentumEMA
from mmema.checkpoints import checkpoint
from mmema.checkpoints.checkpoint import CheckpointError, convert, export, inspect, load


def same(state, other):
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def pair(seed=0):
    """Two sets of weights of one model: averaged, raw."""
    torch.manual_seed(seed)
    average, raw = Toy(), Toy()
    return average.state_dict(), raw.state_dict()


def ema(**settings):
    return {**EMA, 'update_buffers': True, **settings}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A real run of 8 iterations with MMEngine's EMAHook and our average, and a restart."""
    folder = tmp_path_factory.mktemp('run')
    runner = make_runner(folder, epochs=2, ema=ema(momentum=0.2, gamma=3.0))
    runner.train()
    ema_of(runner).restart(steps=4, momentum=0.3)
    runner.save_checkpoint(str(folder), 'restarted.pth')
    return runner, ema_of(runner), folder / 'restarted.pth'


# --- inspect ---------------------------------------------------------------------------------


def test_inspect_a_run_with_our_average(run):
    runner, average, file = run
    report = inspect(file)
    found = report.weights
    same(found.average, average.module.state_dict())
    same(found.raw, runner.model.state_dict())
    assert (found.kind, found.steps, int(found.live['restarts'])) == ('mmema', 4, 1)
    assert found.live['momentum'].item() == 0.3
    assert found.live['gamma'].item() == 3.0
    assert 'MMEngine 0.10' in found.maker
    lines = dict(report.lines())
    assert lines['updates'] == '4'
    assert (lines['momentum'], lines['gamma'], lines['restarts']) == ('0.3', '3', '1')
    assert lines['EMA weights'].startswith('state_dict: ')
    assert lines['raw weights'].startswith("ema_state_dict['module.*']: ")
    assert lines['NaN or infinity'] == 'none'


def test_distance_by_hand(tmp_path):
    raw = {'a': torch.tensor([3.0, 0.0]), 'b': torch.tensor([4.0]), 'n': torch.tensor(5)}
    average = {'a': torch.tensor([3.0, 3.0]), 'b': torch.tensor([8.0]), 'n': torch.tensor(9)}
    raw['bn.running_var'], average['bn.running_var'] = torch.tensor([1e6]), torch.tensor([0.0])
    torch.save({'model': raw, 'ema': {'module': average, 'updates': 7}}, tmp_path / 'x.pth')
    report = inspect(tmp_path / 'x.pth')
    assert report.distance == pytest.approx(1.0)  # sqrt(3^2 + 4^2) / sqrt(3^2 + 4^2)
    assert report.farthest == [('a', 1.0), ('b', 1.0)]


def test_non_finite_tensors_are_named(tmp_path):
    average, raw = pair()
    average['norm.weight'][1] = math.nan
    raw['conv.bias'][0] = math.inf
    torch.save({'model': raw, 'ema': {'module': average, 'updates': 7}}, tmp_path / 'x.pth')
    report = inspect(tmp_path / 'x.pth')
    assert report.non_finite == {'average': ['norm.weight'], 'raw': ['conv.bias']}
    assert ('NaN or infinity', 'average: norm.weight') in report.lines()


def test_distance_of_zeros(tmp_path):
    def distance(average, raw):
        content = {'model': {'a': raw}, 'ema': {'module': {'a': average}, 'updates': 7}}
        torch.save(content, tmp_path / 'x.pth')
        report = inspect(tmp_path / 'x.pth')
        return report.distance, report.farthest

    assert distance(torch.zeros(2), torch.zeros(2)) == (0.0, [])
    assert distance(torch.ones(2), torch.zeros(2)) == (math.inf, [('a', math.inf)])


@pytest.mark.parametrize(
    'name', ['float8_e4m3fn', 'float8_e5m2', 'float16', 'bfloat16', 'float64', 'int8', 'complex64']
)
def test_every_kind_of_number_is_inspected_and_exported(tmp_path, name):
    kind = getattr(torch, name, None) or pytest.skip(f'this torch has no {name}')
    state = {'a': torch.tensor([1.0, 2.0]).to(kind)}
    if name.startswith('float8'):
        state['bad'] = torch.tensor([math.nan]).to(kind)
    if name == 'float64':
        state['large'] = torch.tensor([1e300], dtype=kind)  # no infinity
    torch.save(state, tmp_path / 'x.pth')
    report = inspect(tmp_path / 'x.pth')
    assert report.non_finite['raw'] == (['bad'] if 'bad' in state else [])
    out = export(tmp_path / 'x.pth', tmp_path / 'out.safetensors', 'raw')
    assert torch.equal(load_file(out)['a'].to(torch.complex128), state['a'].to(torch.complex128))


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
    assert found.kind == ('mmema' if cls is RestartableExpMomentumEMA else 'mmengine')

    convert(tmp_path / 'state.pth', tmp_path / 'ours.pth', 'mmema', momentum=0.05, gamma=50.0)
    content = torch.load(tmp_path / 'ours.pth', weights_only=True)
    ours = RestartableExpMomentumEMA(model, momentum=0.3)
    swap(content)
    ours.load_state_dict(content['ema_state_dict'])
    same(ours.module.state_dict(), average.module.state_dict())
    assert (int(ours.steps), ours.momentum, ours.gamma, ours.restarts) == (3, 0.05, 50.0, 0)


def swap(content):
    """What EMAHook does when a run is resumed."""
    for name, tensor in content['state_dict'].items():
        key = f'module.{name}'
        content['state_dict'][name] = content['ema_state_dict'][key]
        content['ema_state_dict'][key] = tensor


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
    with pytest.raises(CheckpointError, match='has no EMA weights; --weights raw takes'):
        export(tmp_path / 'epoch_1.pth', tmp_path / 'out.pth')


# --- export ----------------------------------------------------------------------------------


@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_export_gives_the_weights_and_the_meta(run, tmp_path, weights):
    runner, average, file = run
    expected = (average.module if weights == 'ema' else runner.model).state_dict()
    out = export(file, tmp_path / 'model.pth', weights)
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert out.name == f'model-{digest[:8]}.pth'
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    content = torch.load(out, weights_only=True)
    assert set(content) == {'meta', 'state_dict'}
    same(content['state_dict'], expected)
    original = torch.load(file, weights_only=True)['meta']
    assert {k: v for k, v in content['meta'].items() if k != 'mmema'} == original
    assert content['meta']['mmema'] == {'weights': weights, 'steps': 4}
    assert content['state_dict']._metadata == expected._metadata

    found = load(out)  # and it is still known which weights these are
    assert (found.average is None, found.raw is None) == (weights == 'raw', weights == 'ema')


def test_export_is_the_same_file_each_time(run, tmp_path):
    one = export(run[2], tmp_path / 'model.pth')
    content = one.read_bytes()
    with pytest.raises(CheckpointError, match='exists; --force replaces it'):
        export(run[2], tmp_path / 'model.pth')
    assert export(run[2], tmp_path / 'model.pth', force=True) == one
    assert one.read_bytes() == content
    assert one.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_export_as_safetensors(run, tmp_path, weights):
    runner, average, file = run
    out = export(file, tmp_path / 'model.safetensors', weights, named_by_hash=False)
    assert out == tmp_path / 'model.safetensors'
    expected = (average.module if weights == 'ema' else runner.model).state_dict()
    state = load_file(out)
    same(dict(sorted(state.items())), dict(sorted(expected.items())))
    found = load(out)
    assert (found.average is None) == (weights == 'raw')


def test_tied_strided_and_sixteen_bit_tensors(tmp_path):
    average, raw = pair()
    for state in (average, raw):
        state['tied.weight'] = state['conv.weight']
        state['strided'] = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
        state['view'] = torch.arange(1000.0)[10:14]
        state['half'] = torch.rand(3).bfloat16()
    torch.save({'model': raw, 'ema': {'module': average, 'updates': 1}}, tmp_path / 'x.pth')
    for suffix, read in (('.safetensors', load_file), ('.pth', load_state)):
        out = export(tmp_path / 'x.pth', tmp_path / f'out{suffix}', 'ema')
        same(dict(sorted(read(out).items())), dict(sorted(average.items())))
    kept = load_state(out)
    assert kept['view'].untyped_storage().nbytes() == 16
    assert kept['tied.weight'].data_ptr() == kept['conv.weight'].data_ptr()


def load_state(file):
    return torch.load(file, weights_only=True)['state_dict']


STOCK = (
    ('mmyolo', 'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py'),
    ('mmdet', 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'),
)


@pytest.mark.slow
@pytest.mark.parametrize(('library', 'name'), STOCK)
def test_stock_models_go_through_init_detector(tmp_path, library, name):
    """Both exports detect exactly what the models in memory do.

    MMYOLO has no init_detector of its own but the one of its CAM demo; it uses MMDetection's.
    """
    import numpy as np

    apis = pytest.importorskip('mmdet.apis')
    file, config, models = stock_checkpoint(library, name, tmp_path)
    picture = np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8)
    scores = {}
    for weights in ('ema', 'raw'):
        out = export(file, tmp_path / f'{weights}.pth', weights)
        exported = apis.init_detector(config.copy(), str(out), device='cpu', palette='coco')
        same(exported.state_dict(), models[weights].state_dict())
        assert exported.dataset_meta['classes'] == ('zero', 'one')
        direct = apis.init_detector(config.copy(), None, device='cpu', palette='coco')
        direct.load_state_dict(models[weights].state_dict())
        found, expected = (
            apis.inference_detector(model, picture).pred_instances for model in (exported, direct)
        )
        assert len(found) > 0
        assert torch.equal(found.bboxes, expected.bboxes)
        assert torch.equal(found.scores, expected.scores)
        scores[weights] = found.scores
    assert not torch.equal(scores['ema'], scores['raw'])


def stock_checkpoint(library, name, folder):
    """Return a file as MMEngine's EMAHook and Runner save it, its config and both models."""
    from zoo import build, config_of, without_downloads

    config = config_of(library, name)
    without_downloads(config.model)
    config.model.test_cfg.update(score_thr=0.0, max_per_img=20)
    config.test_dataloader.dataset.update(ann_file='', data_root=None)
    torch.manual_seed(0)
    model = build(library, name)
    hook = EMAHook(ema_type='mmema.RestartableExpMomentumEMA', momentum=0.3, gamma=1)
    runner = argparse.Namespace(model=model, iter=0, epoch=0)
    hook.before_run(runner)
    for step in range(4):
        shake_a_little(model, seeded(step))
        hook.after_train_iter(runner, step)
    models = {'ema': deepcopy(hook.ema_model.module), 'raw': deepcopy(model)}
    meta = {'dataset_meta': {'classes': ('zero', 'one')}, 'cfg': config.pretty_text}
    content = {'meta': meta, 'state_dict': model.state_dict()}
    hook.before_save_checkpoint(runner, content)
    torch.save(content, folder / 'epoch_1.pth')
    return folder / 'epoch_1.pth', config, models


@torch.no_grad()
def shake_a_little(model, generator):
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    for buffer in model.buffers():
        if buffer.is_floating_point() and buffer.dim() == 1:
            buffer.add_(torch.rand(buffer.shape, generator=generator), alpha=0.1)


# --- convert ---------------------------------------------------------------------------------


def files_of_others():
    """A file of each code, as its own save function writes it (tests name what they hold)."""
    average, raw = pair()
    args = argparse.Namespace(model='toy', model_ema_decay=0.9998)
    optimizer = torch.optim.SGD(Toy().parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    torchs = AveragedModel(Toy(), multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    torchs.module.load_state_dict(average)
    torchs.n_averaged.fill_(123)
    return {
        'dfine': {
            'date': '2025-01-01',
            'last_epoch': 3,
            'model': raw,
            'ema': {'module': average, 'updates': 123},
            'optimizer': optimizer.state_dict(),
            'lr_scheduler': scheduler.state_dict(),
        },
        'yolov5': {
            'epoch': 3,
            'best_fitness': 0.1,
            'model': raw,
            'ema': average,
            'updates': 123,
            'optimizer': optimizer.state_dict(),
        },
        'yolox': {'start_epoch': 3, 'model': average, 'optimizer': optimizer.state_dict()},
        'timm': {
            'epoch': 3,
            'arch': 'toy',
            'state_dict': raw,
            'optimizer': optimizer.state_dict(),
            'version': 2,
            'args': args,
            'state_dict_ema': average,
        },
        'torchvision': {
            'model': raw,
            'optimizer': optimizer.state_dict(),
            'lr_scheduler': scheduler.state_dict(),
            'epoch': 3,
            'args': args,
            'model_ema': torchs.state_dict(),
        },
        'averaged_model': torchs.state_dict(),
    }


KINDS = ('dfine', 'yolov5', 'yolox', 'timm', 'torchvision', 'averaged_model')
WITHOUT_RAW = ('yolox', 'averaged_model')
WITHOUT_STEPS = ('yolox', 'timm')


@pytest.mark.parametrize('kind', KINDS)
def test_files_of_others_are_recognized(tmp_path, kind):
    average, raw = pair()
    torch.save(files_of_others()[kind], tmp_path / 'x.pth')
    found = load(tmp_path / 'x.pth')
    assert found.kind == kind
    same(found.average, average)
    assert found.steps == (None if kind in WITHOUT_STEPS else 123)
    if kind in WITHOUT_RAW:
        assert found.raw is None
    else:
        same(found.raw, raw)
    if kind in ('timm', 'torchvision'):
        assert any('0.9998' in note for note in found.notes)


@pytest.mark.parametrize('kind', KINDS)
def test_there_and_back(tmp_path, kind):
    average, raw = pair()
    torch.save(files_of_others()[kind], tmp_path / 'theirs.pth')
    there, back = tmp_path / 'ours.pth', tmp_path / 'back.pth'
    convert(tmp_path / 'theirs.pth', there, 'mmema', steps=123 if kind in WITHOUT_STEPS else None)
    content = torch.load(there, weights_only=True)
    assert int(content['ema_state_dict']['steps']) == 123
    same(content['state_dict'], average)
    found = load(there)
    same(found.raw, average if kind in WITHOUT_RAW else raw)

    convert(there, back, kind)
    again = load(back)
    assert again.kind == kind
    same(again.average, average)
    assert again.steps == (None if kind in WITHOUT_STEPS else 123)


def test_torch_takes_its_own_state_back(tmp_path):
    average, _ = pair()
    torch.save(files_of_others()['dfine'], tmp_path / 'x.pth')
    convert(tmp_path / 'x.pth', tmp_path / 'torch.pth', 'averaged_model')
    model = AveragedModel(Toy(), use_buffers=True)
    model.load_state_dict(torch.load(tmp_path / 'torch.pth', weights_only=True), strict=True)
    same(model.module.state_dict(), average)
    assert int(model.n_averaged) == 123


def test_a_runner_goes_on_from_a_converted_file(run, tmp_path):
    """The same next update as the average that was left: real weights, counter and schedule."""
    runner, average, file = run
    convert(file, tmp_path / 'dfine.pth', 'dfine')
    convert(tmp_path / 'dfine.pth', tmp_path / 'ours.pth', 'mmema', momentum=0.3, gamma=3.0)
    again = make_runner(
        tmp_path / 'work',
        epochs=1,
        ema=ema(momentum=0.2, gamma=100.0),
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


def test_stock_classes_load_what_is_converted_to_mmengine(run, tmp_path):
    convert(run[2], tmp_path / 'stock.pth', 'mmengine')
    content = torch.load(tmp_path / 'stock.pth', weights_only=True)
    swap(content)
    stock = ExponentialMovingAverage(run[0].model, update_buffers=True)
    stock.load_state_dict(content['ema_state_dict'], strict=True)
    same(stock.module.state_dict(), run[1].module.state_dict())


def test_what_gets_lost_is_said(run, tmp_path):
    notes = convert(run[2], tmp_path / 'x.pth', 'yolox')
    assert any('no raw weights' in note for note in notes)
    assert any('no counter: 4 updates' in note for note in notes)
    assert any('no schedule: momentum, gamma' in note for note in notes)
    notes = convert(tmp_path / 'x.pth', tmp_path / 'y.pth', 'mmema', steps=4)
    assert any('training goes on from the average' in note for note in notes)


def test_a_counter_that_nobody_kept_is_not_lost(tmp_path):
    torch.save(files_of_others()['timm'], tmp_path / 'x.pth')
    notes = convert(tmp_path / 'x.pth', tmp_path / 'y.pth', 'yolox')
    assert any('no raw weights' in note for note in notes)
    assert not any('counter' in note for note in notes)


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
        assert (found.kind, found.raw, found.steps) == ('torchvision', None, 123)
        same(load_state(export(tmp_path / 'x.pth', tmp_path / f'{raw}.pth')), average)
        notes = convert(tmp_path / 'x.pth', tmp_path / 'y.pth', 'mmema', force=True)
        assert any('training goes on from the average' in note for note in notes)


@pytest.mark.parametrize('key', ['state_dict', 'model', None])
def test_bare_state_dicts(tmp_path, key):
    _, raw = pair()
    torch.save({key: raw, 'epoch': 3} if key else raw, tmp_path / 'x.pth')
    found = load(tmp_path / 'x.pth')
    same(found.raw, raw)
    assert (found.kind, found.average, found.raw_at) == ('state_dict', None, key or 'the file')


def test_prefixes_of_wrappers_are_taken_off(tmp_path):
    average, raw = pair()
    wrapped = {f'module._orig_mod.{k}': v for k, v in raw.items()}
    averaged = {f'module.module.{k}': v for k, v in average.items()}
    content = {'model': wrapped, 'model_ema': {'n_averaged': torch.tensor(9), **averaged}}
    torch.save(content, tmp_path / 'x.pth')
    found = load(tmp_path / 'x.pth')
    same(found.raw, raw)
    same(found.average, average)


def test_rename(tmp_path):
    torch.save(files_of_others()['dfine'], tmp_path / 'x.pth')
    rename = {'conv.': 'backbone.stem.', '': 'model.'}
    convert(tmp_path / 'x.pth', tmp_path / 'y.pth', 'mmema', rename=rename)
    names = list(load(tmp_path / 'y.pth').average)
    assert names[:3] == ['model.anchors', 'model.calls', 'backbone.stem.weight']
    with pytest.raises(CheckpointError, match="no name begins with 'convv.'"):
        convert(tmp_path / 'x.pth', tmp_path / 'z.pth', 'mmema', rename={'convv.': 'a.'})
    with pytest.raises(CheckpointError, match="two tensors would be called 'conv.weight'"):
        convert(tmp_path / 'x.pth', tmp_path / 'z.pth', 'mmema', rename={'tied.': 'conv.'})


def test_stripped_yolov5(tmp_path):
    average, _ = pair()
    content = dict(files_of_others()['yolov5'], model=average, ema=None, updates=None)
    torch.save(content, tmp_path / 'x.pt')
    found = load(tmp_path / 'x.pt')
    same(found.average, average)
    assert (found.raw, found.steps, found.average_at) == (None, None, 'model')


def test_yolov5_with_pickled_models_needs_trust(tmp_path):
    model = Toy()
    content = dict(files_of_others()['yolov5'], model=None, ema=model)
    torch.save(content, tmp_path / 'x.pt')
    with pytest.raises(CheckpointError, match=r'holds toys\.Toy.*If you trust it: --trust'):
        load(tmp_path / 'x.pt')
    found = load(tmp_path / 'x.pt', trust=True)
    same(found.average, model.state_dict())
    assert found.raw is None


def test_numbers_that_are_missing_or_wrong(tmp_path):
    torch.save(files_of_others()['yolox'], tmp_path / 'x.pth')

    def refused(match, **kwargs):
        with pytest.raises(CheckpointError, match=match):
            convert(tmp_path / 'x.pth', tmp_path / 'y.pth', **kwargs)
        assert not (tmp_path / 'y.pth').exists()

    refused('does not say how many updates .*--steps N')
    refused('steps must be at least 0, got -1', steps=-1)
    refused('momentum and gamma are given together', steps=1, momentum=0.1)
    refused('only with --to mmema', steps=1, momentum=0.1, gamma=1.0, to='dfine')
    refused(r'momentum must be in \(0, 1\), got 1.0', steps=1, momentum=1.0, gamma=1.0)
    refused('gamma must be above 0, got 0', steps=1, momentum=0.1, gamma=0.0)
    refused('to must be one of .*dfine.*got .pytorch', to='pytorch')


# --- bad files -------------------------------------------------------------------------------


def test_truncated_at_many_places(run, tmp_path):
    whole = Path(run[2]).read_bytes()
    for size in (1, 10, 100, 1000, len(whole) // 2, len(whole) - 30):
        (tmp_path / 'x.pth').write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r'x\.pth: it is damaged, cut short') as caught:
            load(tmp_path / 'x.pth')
        assert '\n' not in str(caught.value)
        assert str(size) in str(caught.value)


@pytest.mark.parametrize(
    ('content', 'match'),
    [
        (b'', r'is empty \(0 bytes\)'),
        (b'<html>Not found</html>', 'damaged, cut short or no checkpoint'),
        (os.urandom(5000), 'damaged, cut short or no checkpoint'),
        (b'PK\x03\x04' + bytes(500), 'damaged, cut short or no checkpoint'),
    ],
)
def test_files_of_something_else(tmp_path, content, match):
    (tmp_path / 'x.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path / 'x.pth')
    (tmp_path / 'x.safetensors').write_bytes(content)
    with pytest.raises(CheckpointError, match='x.safetensors'):
        load(tmp_path / 'x.safetensors')


@pytest.mark.parametrize(
    ('content', 'match'),
    [
        ([1, 2], 'holds a list, and a checkpoint is a dict'),
        (torch.zeros(2), 'holds a Tensor'),
        ({}, 'in no format .* it holds nothing'),
        ({'weights': 1, 'stuff': 2}, "in no format .* it holds 'weights', 'stuff'"),
        ({'state_dict': [1], 'meta': {}}, 'state_dict must be names and tensors, got a list'),
        ({'state_dict': {'a': 1}, 'meta': {}}, "state_dict .* but 'a' is a int"),
        ({'state_dict': {3: torch.zeros(1)}, 'meta': {}}, 'state_dict .* but 3 is a Tensor'),
        ({'model': {}, 'ema': {'module': {}, 'updates': 'x'}}, "updates must be a number, got 'x'"),
        ({'shadow_params': [], 'decay': 1}, 'diffusers or pytorch_ema'),
        ({'state_dict': {'a': torch.zeros(1)}, 'meta': 'x'}, "meta must be a dict, got 'x'"),
        (
            {'state_dict': {'a': torch.zeros(1)}, 'meta': {'mmema': [1]}},
            r'mmema must be a dict, got \[1\]',
        ),
        (
            {
                'state_dict': {'a': torch.zeros(1)},
                'meta': {'mmema': {'weights': 'ema', 'steps': 'x'}},
            },
            "steps must be a number, got 'x'",
        ),
        ({'model': {}, 'last_epoch': 1, 'ema': {'x': 1}}, "ema must be a dict with 'module' in it"),
    ],
)
def test_contents_of_something_else(tmp_path, content, match):
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path / 'x.pth')


@pytest.mark.parametrize('text', ['[1]', '"x"', '3'])
def test_safetensors_with_metadata_of_something_else(tmp_path, text):
    save_file({'a': torch.zeros(1)}, tmp_path / 'x.safetensors', {'mmema': text})
    with pytest.raises(CheckpointError, match='x.safetensors: meta must be a dict, got'):
        load(tmp_path / 'x.safetensors')


def odd_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch says of most of these that they are in beta
        yield torch.eye(3).to_sparse(), 'is sparse'
        yield torch.eye(3).to_sparse_csr(), 'is sparse'
        yield torch.empty(3, device='meta'), 'has no data'
        yield torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), r'quantized \(qint8\)'
        yield torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), 'sparse or nested'


@pytest.mark.parametrize('number', range(5))
def test_tensors_that_are_not_plain_are_named(tmp_path, number):
    tensor, match = list(odd_tensors())[number]
    for content, where in (
        ({'conv.weight': tensor}, 'the file'),
        ({'steps': torch.tensor(1), 'module.conv.weight': tensor}, 'the file'),
        ({'state_dict': {'conv.weight': tensor}, 'meta': {}}, 'state_dict'),
    ):
        torch.save(content, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=f"x.pth: {where}: 'conv.weight' .*{match}"):
            load(tmp_path / 'x.pth')


def test_torch_does_not_talk_before_our_line(tmp_path, recwarn):
    with open(tmp_path / 'x.pth', 'wb') as file:
        pickle.dump({'state_dict': 1}, file, 4)
    with pytest.raises(CheckpointError, match='damaged, cut short or no checkpoint'):
        load(tmp_path / 'x.pth')
    assert [str(warning.message) for warning in recwarn] == []


def test_hostile_pickle_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'owned'),)

    for protocol in (2, 4):
        with open(tmp_path / 'x.pth', 'wb') as file:
            pickle.dump({'state_dict': Hostile(), 'meta': {}}, file, protocol)
        with pytest.raises(CheckpointError):
            load(tmp_path / 'x.pth')
    torch.save({'state_dict': Hostile(), 'meta': {}}, tmp_path / 'y.pth')
    with pytest.raises(CheckpointError, match='can run code that is in the file'):
        load(tmp_path / 'y.pth')
    assert not (tmp_path / 'owned').exists()


def test_missing_package_is_named(tmp_path):
    torch.save({'ema': Toy(), 'model': None}, tmp_path / 'x.pt')
    content = (tmp_path / 'x.pt').read_bytes().replace(b'toys\nToy', b'toyz\nToy')
    (tmp_path / 'x.pt').write_bytes(content)
    with pytest.raises(CheckpointError, match="No module named 'toyz'.*PYTHONPATH"):
        load(tmp_path / 'x.pt', trust=True)


def test_places_that_are_no_files(tmp_path):
    with pytest.raises(CheckpointError, match='does not exist'):
        load(tmp_path / 'no.pth')
    with pytest.raises(CheckpointError, match='is a folder'):
        load(tmp_path)
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(CheckpointError, match='no ordinary file'):
        load(tmp_path / 'pipe')


def test_places_that_cannot_be_written(run, tmp_path):
    for out, match in (
        (tmp_path, 'is a folder'),
        (tmp_path / 'x.onnx', r'must end in \.pth or \.safetensors, got x\.onnx'),
        (tmp_path / 'no' / 'x.pth', 'there is no folder'),
    ):
        with pytest.raises(CheckpointError, match=match):
            export(run[2], out)
    (tmp_path / 'x.pth').write_text('mine')
    with pytest.raises(CheckpointError, match='exists; --force'):
        export(run[2], tmp_path / 'x.pth', named_by_hash=False)
    with pytest.raises(CheckpointError, match='exists; --force'):
        convert(run[2], tmp_path / 'x.pth')
    assert (tmp_path / 'x.pth').read_text() == 'mine'
    with pytest.raises(CheckpointError, match="'ema' or 'raw', got 'both'"):
        export(run[2], tmp_path / 'y.pth', 'both')


def test_nothing_half_written_is_left(run, tmp_path, monkeypatch):
    def full(content, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    (tmp_path / 'x.pth').write_text('mine')
    monkeypatch.setattr(checkpoint.torch, 'save', full)
    with pytest.raises(CheckpointError, match='cannot be written: .*No space left'):
        export(run[2], tmp_path / 'x.pth', force=True, named_by_hash=False)
    assert [p.name for p in tmp_path.iterdir()] == ['x.pth']
    assert (tmp_path / 'x.pth').read_text() == 'mine'


def test_files_of_older_torch(tmp_path):
    average, raw = pair()
    content = {'model': raw, 'ema': {'module': average, 'updates': 5}}
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
    same(load(tmp_path / 'x.pth').average, average)


def test_the_loader_allows_no_more_than_before_when_it_is_done(tmp_path):
    torch.save(files_of_others()['timm'], tmp_path / 'x.pth')
    load(tmp_path / 'x.pth')
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
