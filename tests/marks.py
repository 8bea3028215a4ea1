"""Marks and parameters that several files of tests share."""

import pytest
import torch

BUFFERS = pytest.mark.parametrize('update_buffers', [False, True])
GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
]
ON_GPU = pytest.mark.parametrize('source', [pytest.param('cuda', marks=GPU)])


def since_torch_2_1(why):
    return pytest.mark.skipif(not hasattr(torch, '_foreach_copy_'), reason=f'torch 2.0 {why}')
