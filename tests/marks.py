"""Marks and parameters that several files of tests share."""

import os

import pytest
import torch

# Of the random runs of `make extensive`: another one in each call.
SEED = int(os.environ.get('MMEMA_SEED', 0))

BUFFERS = pytest.mark.parametrize('update_buffers', [False, True])
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
]
ON_GPU = pytest.mark.parametrize('source', [pytest.param('cuda', marks=GPU)])


def since_torch_2_1(why):
    return pytest.mark.skipif(not hasattr(torch, '_foreach_copy_'), reason=f'torch 2.0 {why}')


def extensive(cases):
    """Parameters that only `make extensive` runs."""
    return [pytest.param(*case, marks=pytest.mark.extensive) for case in cases]
