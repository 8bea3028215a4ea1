"""Marks and parameters that several files of tests share."""

import os

import mmengine
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


def multiplies_in_half():
    try:
        torch.nn.Linear(1, 1).half()(torch.ones(1, 1).half())
    except RuntimeError:
        return False
    return True


HALF_ON_CPU = pytest.mark.skipif(
    not multiplies_in_half(), reason='this torch has no products in half precision on a CPU'
)
SINCE_TORCH_2_6 = pytest.mark.skipif(
    torch.__version__ < (2, 6), reason='torch before 2.6 reads files of MMEngine only with trust'
)
SINCE_MMENGINE_0_10_3 = pytest.mark.skipif(
    mmengine.utils.digit_version(mmengine.__version__) < mmengine.utils.digit_version('0.10.3'),
    reason='MMEngine before 0.10.3 begins the data anew when it resumes by iterations',
)


def extensive(cases):
    """Parameters that only `make extensive` runs."""
    return [pytest.param(*case, marks=pytest.mark.extensive) for case in cases]
