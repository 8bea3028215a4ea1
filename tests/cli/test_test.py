"""What mmema test refuses; that it finds what training logged stands in test_train.py."""

import pytest
import torch
from tool_runs import CONFIG, refusal

from mmema.cli import common

pytest.importorskip('mmyolo')


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (['none.py', 'some.pth'], 'no config file none.py'),
        ([CONFIG, 'none.pth'], 'no checkpoint file none.pth; . holds some.pth'),
        ([CONFIG, 'some.pth', '--out', 'boxes.txt'], '--out takes the name of a .pkl file'),
        ([CONFIG, 'some.pth', '--cfg-options', '=1'], "got '=1'"),
    ],
)
def test_refuses_before_it_imports_the_libraries(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.setattr(common, 'import_libraries', pytest.fail)
    (tmp_path / 'some.pth').touch()
    assert reason in refusal('test', *arguments, folder=tmp_path)


@pytest.mark.slow
def test_refuses_the_weights_of_another_model(tmp_path):
    torch.save({'state_dict': {}}, tmp_path / 'odd.pth')
    reason = refusal('test', CONFIG, 'odd.pth', folder=tmp_path)
    assert 'does not fit the model of the config: 177 of 177 parameters' in reason


def test_refuses_a_state_dict_that_is_none(tmp_path):
    torch.save({'state_dict': [1]}, tmp_path / 'odd.pth')
    reason = refusal('test', CONFIG, 'odd.pth', folder=tmp_path)
    assert reason.endswith(
        'odd.pth is no checkpoint: its state_dict is a list, not tensors by name'
    )
