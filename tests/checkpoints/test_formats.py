"""Contents of checkpoints: whose they are, and which weights are where."""

import warnings

import pytest
import torch
from marks import SINCE_TORCH_2_6
from samples import KINDS, WITHOUT_RAW, WITHOUT_STEPS, files_of_others, pair, same

from mmema.checkpoints.files import load
from mmema.checkpoints.formats import CheckpointError

MAKERS = {
    'dfine': 'D-FINE',
    'yolov5': 'YOLOv5',
    'yolox': 'YOLOX',
    'timm': 'timm',
    'torchvision': 'torchvision',
    'averaged_model': 'AveragedModel of torch',
}


@SINCE_TORCH_2_6
@pytest.mark.parametrize('kind', KINDS)
def test_files_of_others_are_recognized(tmp_path, kind):
    average, raw = pair()
    torch.save(files_of_others()[kind], tmp_path / 'x.pth')
    found = load(tmp_path / 'x.pth')
    assert MAKERS[kind] in found.maker
    same(found.average, average)
    assert found.steps == (None if kind in WITHOUT_STEPS else 123)
    if kind in WITHOUT_RAW:
        assert found.raw is None
    else:
        same(found.raw, raw)
    if kind in ('timm', 'torchvision'):
        assert any('0.9998' in note for note in found.notes)


@pytest.mark.parametrize('key', ['state_dict', 'model', None])
def test_bare_state_dicts(tmp_path, key):
    _, raw = pair()
    torch.save({key: raw, 'epoch': 3} if key else raw, tmp_path / 'x.pth')
    found = load(tmp_path / 'x.pth')
    same(found.raw, raw)
    assert (found.average, found.raw_at) == (None, key or 'the file')
    assert found.notes == ['nothing in the file says whether these are averaged or raw weights']


def test_prefixes_of_wrappers_are_taken_off(tmp_path):
    average, raw = pair()
    wrapped = {f'module._orig_mod.{k}': v for k, v in raw.items()}
    averaged = {f'module.module.{k}': v for k, v in average.items()}
    content = {'model': wrapped, 'model_ema': {'n_averaged': torch.tensor(9), **averaged}}
    torch.save(content, tmp_path / 'x.pth')
    found = load(tmp_path / 'x.pth')
    same(found.raw, raw)
    same(found.average, average)


def test_stripped_yolov5(tmp_path):
    average, _ = pair()
    content = dict(files_of_others()['yolov5'], model=average, ema=None, updates=None)
    torch.save(content, tmp_path / 'x.pt')
    found = load(tmp_path / 'x.pt')
    same(found.average, average)
    assert (found.raw, found.steps, found.average_at) == (None, None, 'model')


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
        ({'model': {}, 'ema': {'module': {}, 'updates': 'x'}}, r"updates'\] must be a .* got 'x'"),
        ({'shadow_params': [], 'decay': 1}, "in no format .* it holds 'shadow_params', 'decay'"),
        ({'model': None, 'ema': None}, 'file of YOLOv5 .* without any weights'),
        ({'model': None, 'last_epoch': 1}, 'file of RT-DETR, D-FINE or DEIM without any weights'),
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
        ({'model': {}, 'last_epoch': 1, 'ema': {'x': 1}}, r"ema must be .* at ema\['module'\]"),
    ],
)
def test_contents_of_something_else(tmp_path, content, match):
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=match):
        load(tmp_path / 'x.pth')


def odd_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch says of most of these that they are in beta
        yield torch.eye(3).to_sparse()
        yield torch.eye(3).to_sparse_csr()
        yield torch.empty(3, device='meta')
        yield torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
        yield torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@SINCE_TORCH_2_6
@pytest.mark.parametrize('number', range(5))
def test_tensors_that_are_not_dense_are_named(tmp_path, number):
    tensor = list(odd_tensors())[number]
    for content, where in (
        ({'conv.weight': tensor}, 'the file'),
        ({'steps': torch.tensor(1), 'module.conv.weight': tensor}, 'module.*'),
        ({'state_dict': {'conv.weight': tensor}, 'meta': {}}, 'state_dict'),
    ):
        torch.save(content, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError) as caught:
            load(tmp_path / 'x.pth')
        expected = f"x.pth: {where}: 'conv.weight' is sparse, nested, quantized or without data"
        assert expected in str(caught.value)


@pytest.mark.parametrize(
    'schedule',
    [
        torch.tensor(10**15),
        torch.tensor([0.5]),
        torch.tensor([101, 300]),
        torch.tensor([200, 201], dtype=torch.uint8),
        torch.zeros(1, 1, dtype=torch.uint8),
        'exp',
    ],
)
def test_a_schedule_that_is_no_name(tmp_path, schedule):
    state = {'module.a': torch.zeros(1), 'steps': torch.tensor(1), 'restarts': torch.tensor(0)}
    run = {'state_dict': {'a': torch.zeros(1)}, 'ema_state_dict': {**state, 'schedule': schedule}}
    for content in (run['ema_state_dict'], run):
        torch.save(content, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match='schedule must be a name in ASCII'):
            load(tmp_path / 'x.pth')
