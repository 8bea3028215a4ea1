"""What ``torch.load(weights_only=True)`` reads of MMEngine's objects, and what it does not."""

import pickle

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import load_checkpoint

from mmema.checkpoints.torch_load import HAS_ALLOW_LIST

pytestmark = pytest.mark.skipif(not HAS_ALLOW_LIST, reason='torch before 2.6 has no list')


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


def test_what_others_allow_for_a_while_stays_allowed(tmp_path):
    with torch.serialization.safe_globals([HistoryBuffer, np.ndarray, np.dtype]):
        pass
    test_a_history_buffer_comes_back(tmp_path)


class Harmful:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), 'w')


def test_mmengine_and_its_fork_run_no_code_of_a_file(tmp_path):
    torch.save({'state_dict': {}, 'loss': HistoryBuffer([1.0], [1])}, tmp_path / 'good.pth')
    torch.save({'state_dict': {}, 'x': Harmful(tmp_path / 'made')}, tmp_path / 'bad.pth')
    model = torch.nn.Linear(1, 1)
    assert load_checkpoint(model, str(tmp_path / 'good.pth'))['loss'].current() == 1
    with pytest.raises(pickle.UnpicklingError, match='Weights only load failed'):
        load_checkpoint(model, str(tmp_path / 'bad.pth'))
    assert not (tmp_path / 'made').exists()
    test_a_history_buffer_comes_back(tmp_path)
