"""Whole files and cut ones of both formats of torch, and hostile ones."""

import pickle

import numpy as np
import pytest
import torch
from marks import SINCE_TORCH_2_6
from samples import Hostile

from mmema.checkpoints.probe import is_whole, structure, top_level_keys

BOTH_FORMATS = pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'older'])


def content():
    """Tensors of several sizes of number, shared and not, and what MMEngine puts beside them."""
    tensor = torch.randn(100)
    return {
        'state_dict': {
            **{str(kind): torch.ones(3).to(kind) for kind in NUMBERS},
            'all': tensor,
            'view': tensor[10:20],
        },
        'message_hub': {'value': np.float64(3), 'array': np.arange(4)},
        'optimizer': {'state': {}},
    }


NUMBERS = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.complex64, torch.complex128),
)


@SINCE_TORCH_2_6
@BOTH_FORMATS
def test_whole_files_and_their_keys(run, tmp_path, zipped):
    real = torch.load(run[2], weights_only=True)
    for number, saved in enumerate((content(), real, {}, [1, 2])):
        file = tmp_path / f'{number}.pth'
        torch.save(saved, file, _use_new_zipfile_serialization=zipped)
        assert is_whole(file)
        assert top_level_keys(file) == (set(saved) if isinstance(saved, dict) else set())


@SINCE_TORCH_2_6
@BOTH_FORMATS
def test_the_structure_has_numbers_and_text_and_no_tensors(run, tmp_path, zipped):
    content = torch.load(run[2], weights_only=True)
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    found = structure(tmp_path / 'x.pth')
    assert found['meta'] == content['meta']
    assert found['message_hub']['runtime_info']['max_iters'] == 8
    assert list(found['state_dict']) == list(content['state_dict'])
    assert not any(isinstance(value, torch.Tensor) for value in found['state_dict'].values())


@BOTH_FORMATS
def test_cut_files(tmp_path, zipped):
    torch.save(content(), tmp_path / 'whole.pth', _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / 'whole.pth').read_bytes()
    for size in (*range(0, len(whole) - 20, 37), *range(len(whole) - 20, len(whole))):
        (tmp_path / 'cut.pth').write_bytes(whole[:size])
        assert not is_whole(tmp_path / 'cut.pth'), size


@pytest.mark.parametrize('found', [b'', b'no checkpoint', pickle.dumps({'optimizer': 1}), None])
def test_other_files(tmp_path, found):
    if found is not None:
        (tmp_path / 'x.pth').write_bytes(found)
    assert not is_whole(tmp_path / 'x.pth')
    assert top_level_keys(tmp_path / 'x.pth') == set()


@BOTH_FORMATS
@pytest.mark.parametrize('protocol', [2, 4])
def test_nothing_in_a_file_is_run(tmp_path, zipped, protocol):
    torch.save(
        {'optimizer': 1, 'state': [Hostile(tmp_path / 'owned')]},
        tmp_path / 'x.pth',
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    assert is_whole(tmp_path / 'x.pth')
    assert top_level_keys(tmp_path / 'x.pth') == {'optimizer', 'state'}
    assert not (tmp_path / 'owned').exists()
    torch.load(tmp_path / 'x.pth', weights_only=False)  # which does run it
    assert (tmp_path / 'owned').exists()
