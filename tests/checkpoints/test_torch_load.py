"""What ``torch.load(weights_only=True)`` reads of MMEngine's objects, and what it does not."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

pytestmark = pytest.mark.skipif(
    not hasattr(torch.serialization, 'safe_globals'), reason='torch before 2.5 has no list'
)


def test_a_history_buffer_comes_back(tmp_path):
    history = HistoryBuffer([1.0, 2.0, 6.0], [1, 1, 1])
    torch.save({'loss': history, 'value': np.float64(3)}, tmp_path / 'x.pth')
    content = torch.load(tmp_path / 'x.pth', weights_only=True)
    assert (content['loss'].mean(), content['loss'].current(), content['value']) == (3, 6, 3)


class Attribute:
    def __init__(self, owner, name):
        self.reference = owner, name

    def __reduce__(self):
        return getattr, self.reference


@pytest.mark.parametrize(
    ('owner', 'name'), [(HistoryBuffer, '__init__'), (np.ndarray, 'tofile'), (np.dtype, 'type')]
)
def test_other_attributes_are_refused(tmp_path, owner, name):
    torch.save(Attribute(owner, name), tmp_path / 'x.pth')
    with pytest.raises(pickle.UnpicklingError, match=f"refusing to read attribute '{name}'"):
        torch.load(tmp_path / 'x.pth', weights_only=True)
