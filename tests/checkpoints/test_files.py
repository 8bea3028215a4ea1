"""Files that are read: damaged, hostile, of older torch, or no files at all."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from marks import SINCE_TORCH_2_6
from safetensors.torch import save_file
from samples import Hostile, files_of_others, pair, same
from toys import Toy

from mmema.checkpoints.files import load
from mmema.checkpoints.formats import CheckpointError


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
        (b'', r'damaged, cut short or no checkpoint at all \(0 bytes'),
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


def test_files_of_older_torch(tmp_path):
    average, raw = pair()
    content = {'model': raw, 'ema': {'module': average, 'updates': 5}}
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=False)
    same(load(tmp_path / 'x.pth').average, average)


@pytest.mark.parametrize('text', ['[1]', '"x"', '3'])
def test_safetensors_with_metadata_of_something_else(tmp_path, text):
    save_file({'a': torch.zeros(1)}, tmp_path / 'x.safetensors', {'mmema': text})
    with pytest.raises(CheckpointError, match='x.safetensors: meta must be a dict, got'):
        load(tmp_path / 'x.safetensors')


def test_places_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'no.pth', tmp_path, tmp_path / 'pipe'):
        with pytest.raises(CheckpointError, match=rf'{path} is no file \(seen from '):
            load(path)


def test_hostile_pickle_is_not_run(tmp_path):
    for protocol in (2, 4):
        with open(tmp_path / 'x.pth', 'wb') as file:
            pickle.dump({'state_dict': Hostile(tmp_path / 'owned'), 'meta': {}}, file, protocol)
        with pytest.raises(CheckpointError):
            load(tmp_path / 'x.pth')
    torch.save({'state_dict': Hostile(tmp_path / 'owned'), 'meta': {}}, tmp_path / 'y.pth')
    with pytest.raises(CheckpointError, match='can run code that is in the file'):
        load(tmp_path / 'y.pth')
    assert not (tmp_path / 'owned').exists()


def test_yolov5_with_pickled_models_needs_trust(tmp_path, monkeypatch):
    model = Toy()
    content = dict(files_of_others()['yolov5'], model=None, ema=model)
    torch.save(content, tmp_path / 'x.pt')
    with pytest.raises(
        CheckpointError, match=r'toys\.Toy.*If you trust it: --trust \(trust=True\)'
    ):
        load(tmp_path / 'x.pt')
    found = load(tmp_path / 'x.pt', trust=True)
    same(found.average, model.state_dict())
    assert found.raw is None
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    same(load(tmp_path / 'x.pt').average, model.state_dict())


def test_missing_package_is_named(tmp_path):
    torch.save({'ema': Toy(), 'model': None}, tmp_path / 'x.pt')
    content = (tmp_path / 'x.pt').read_bytes().replace(b'toys\nToy', b'toyz\nToy')
    (tmp_path / 'x.pt').write_bytes(content)
    with pytest.raises(CheckpointError, match="No module named 'toyz'.*PYTHONPATH"):
        load(tmp_path / 'x.pt', trust=True)


def test_torch_does_not_talk_before_our_line(tmp_path, recwarn):
    with open(tmp_path / 'x.pth', 'wb') as file:
        pickle.dump({'state_dict': 1}, file, 4)
    with pytest.raises(CheckpointError, match='damaged, cut short or no checkpoint'):
        load(tmp_path / 'x.pth')
    assert [str(warning.message) for warning in recwarn] == []


@SINCE_TORCH_2_6
def test_the_loader_allows_no_more_than_before_when_it_is_done(tmp_path):
    torch.save(files_of_others()['timm'], tmp_path / 'x.pth')
    load(tmp_path / 'x.pth')
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
