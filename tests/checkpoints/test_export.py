"""Files with one set of weights, and new files that cannot be written."""

import argparse
import hashlib
import math
import os
from copy import deepcopy

import pytest
import torch
from marks import SINCE_TORCH_2_6
from mmengine.hooks import EMAHook
from safetensors.torch import load_file
from samples import load_state, pair, same
from toys import seeded

from mmema.checkpoints.convert import convert
from mmema.checkpoints.export import export
from mmema.checkpoints.files import load
from mmema.checkpoints.formats import CheckpointError
from mmema.checkpoints.report import inspect
from mmema.run import ema_hook_of

pytestmark = SINCE_TORCH_2_6


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
    assert found.steps == (4 if weights == 'ema' else None)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('name', ['short', 'restarted', 'mean'])
def test_export_of_another_average_of_the_run(run_of_several, tmp_path, name, suffix):
    runner, file = run_of_several
    record = {'metric': 'score', 'score': 0.5, 'epoch': 2}
    out = export(file, tmp_path / f'model{suffix}', name, record=record)
    expected = ema_hook_of(runner).also[name].module.state_dict()
    state = load_file(out) if suffix == '.safetensors' else load_state(out)
    same(dict(sorted(state.items())), dict(sorted(expected.items())))
    assert {'norm.running_mean', 'norm.num_batches_tracked', 'calls'} <= set(state)
    if suffix == '.pth':
        assert list(state) == list(expected) and state._metadata == expected._metadata
    found = load(out)
    steps = 4 if name == 'restarted' else 8
    assert found.exported == {'weights': name, 'steps': steps, **record}
    assert found.raw is None and found.steps == steps
    assert found.notes == [f'exported by mmema: weights {name}, metric score, score 0.5, epoch 2']
    again = export(out, tmp_path / 'again.pth')  # its only weights, which keep their name
    assert load(again).exported == found.exported


def test_a_name_that_the_file_lacks_is_refused_with_those_it_has(run_of_several, run, tmp_path):
    several = 'ema, raw, short, restarted, mean'
    for file, names in ((run_of_several[1], several), (run[2], 'ema, raw')):
        with pytest.raises(
            CheckpointError, match=f'has no long weights; it has {names}$'
        ) as caught:
            export(file, tmp_path / 'x.pth', 'long')
        assert '\n' not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda also: also.update(short=3), r"ema_also\['short'\] must be a dict, got 3"),
        (lambda also: also['short'].update(state_dict=[1]), 'state_dict must be a dict'),
        (
            lambda also: also['short']['state_dict'].update({'module.norm.weight': 'x'}),
            r"ema_also\['short'\] must be names and tensors, but 'norm.weight' is a str",
        ),
    ],
)
def test_a_damaged_average_is_refused(run_of_several, tmp_path, damage, message):
    content = torch.load(run_of_several[1], weights_only=True)
    damage(content['ema_also'])
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=message):
        export(tmp_path / 'x.pth', tmp_path / 'y.pth', 'short')


def test_an_average_that_lacks_a_tensor_is_left_out_and_said(run_of_several, tmp_path):
    content = torch.load(run_of_several[1], weights_only=True)
    del content['ema_also']['short']['state_dict']['module.calls']
    torch.save(content, tmp_path / 'x.pth')
    lacks = r"ema_also\['short'\] lacks 1 of 10 tensors, such as 'calls': it is left out"
    with pytest.raises(
        CheckpointError, match=rf'no short .*{lacks}.*has ema, raw, restarted, mean'
    ):
        export(tmp_path / 'x.pth', tmp_path / 'y.pth', 'short')


def test_export_is_the_same_file_each_time(run, tmp_path):
    one = export(run[2], tmp_path / 'model.pth')
    content = one.read_bytes()
    with pytest.raises(CheckpointError, match='exists; --force .force=True. replaces it'):
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


def test_places_that_cannot_be_written(run, tmp_path):
    for out, match in (
        (tmp_path, r'must end in \.pth'),
        (tmp_path / 'x.onnx', r'must end in \.pth or \.safetensors, got x\.onnx'),
        (tmp_path / 'no' / 'x.pth', 'cannot be written: .*No such file or directory'),
    ):
        with pytest.raises(CheckpointError, match=match):
            export(run[2], out)
    (tmp_path / 'x.pth').write_text('mine')
    with pytest.raises(CheckpointError, match='exists; --force'):
        export(run[2], tmp_path / 'x.pth', named_by_hash=False)
    with pytest.raises(CheckpointError, match='exists; --force'):
        convert(run[2], tmp_path / 'x.pth')
    assert (tmp_path / 'x.pth').read_text() == 'mine'
    with pytest.raises(CheckpointError, match='no both weights; it has ema, raw'):
        export(run[2], tmp_path / 'y.pth', 'both')


def test_nothing_half_written_is_left(run, tmp_path, monkeypatch):
    def full(content, file):
        file.write(b'half')
        raise OSError(28, 'No space left on device')

    (tmp_path / 'x.pth').write_text('mine')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(CheckpointError, match='cannot be written: .*No space left'):
        export(run[2], tmp_path / 'x.pth', force=True, named_by_hash=False)
    assert [p.name for p in tmp_path.iterdir()] == ['x.pth']
    assert (tmp_path / 'x.pth').read_text() == 'mine'


STOCK = (
    ('mmyolo', 'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py'),
    pytest.param(*('mmdet', 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'), marks=pytest.mark.extensive),
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
