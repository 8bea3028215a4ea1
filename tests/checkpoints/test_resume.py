"""Which file a run goes on from."""

import os

import pytest
import torch

from mmema.checkpoints.resume import KEPT, checkpoint_to_resume, is_whole


def save(folder, name, age, optimizer=True):
    """Write a checkpoint that is ``age`` seconds old."""
    file = folder / f'{name}.pth'
    torch.save({'optimizer': {}} if optimizer else {}, file)
    os.utime(file, (1e9 - age, 1e9 - age))
    return str(file)


def cut(file):
    with open(file, 'rb+') as opened:
        opened.truncate(300)
    assert not is_whole(file)


def note(folder, text):
    (folder / 'last_checkpoint').write_text(str(text))


def test_the_one_that_mmengine_names(tmp_path):
    first, second = save(tmp_path, 'epoch_1', 20), save(tmp_path, 'epoch_2', 10)
    assert checkpoint_to_resume(tmp_path) is None  # no run has finished a checkpoint here
    note(tmp_path, first)
    assert checkpoint_to_resume(tmp_path) == first
    note(tmp_path, second)
    assert checkpoint_to_resume(tmp_path) == second


def test_a_folder_that_was_moved(tmp_path):
    file = save(tmp_path, 'epoch_1', 10)
    note(tmp_path, '/somewhere/else/epoch_1.pth')
    assert checkpoint_to_resume(tmp_path) == file


def test_checkpoints_in_a_folder_of_their_own(tmp_path):
    out = tmp_path / 'out'
    out.mkdir()
    old, named = save(tmp_path, 'epoch_3', 50), save(out, 'epoch_3', 10)
    note(tmp_path, named)
    assert checkpoint_to_resume(tmp_path) == named != old
    before = save(out, 'epoch_2', 20)
    cut(named)
    cut(old)
    assert checkpoint_to_resume(tmp_path) == before


def test_a_name_that_only_mmengine_can_read(tmp_path):
    note(tmp_path, 's3://bucket/epoch_3.pth')
    assert checkpoint_to_resume(tmp_path) == 's3://bucket/epoch_3.pth'


@pytest.mark.parametrize('break_it', [cut, os.unlink])
def test_the_newest_whole_one_with_an_optimizer_if_that_is_broken(
    tmp_path, break_it, warnings_seen
):
    save(tmp_path, 'epoch_8', 99)  # of an earlier run in the same folder
    save(tmp_path, 'epoch_1', 40)
    expected = save(tmp_path, 'epoch_2', 30)
    save(tmp_path, KEPT + 'iter_20', 15)  # a copy of what was saved long before
    named = save(tmp_path, 'epoch_3', 10)
    save(tmp_path, 'best_without_optimizer', 5, optimizer=False)
    (tmp_path / 'foreign.pth').write_bytes(b'no checkpoint')
    torch.save([1, 2], tmp_path / 'list.pth')
    note(tmp_path, named)
    break_it(named)
    assert checkpoint_to_resume(tmp_path) == expected
    state = 'cut short' if break_it is cut else 'gone'
    assert f'{named} is {state}, so the run is resumed from {expected}.' in warnings_seen.text


def test_none_left_is_an_error(tmp_path):
    file = save(tmp_path, 'epoch_1', 10)
    note(tmp_path, file)
    cut(file)
    with pytest.raises(ValueError, match='epoch_1.pth is cut short, and no other one is whole'):
        checkpoint_to_resume(tmp_path)
    note(tmp_path, '')
    os.unlink(file)
    with pytest.raises(ValueError, match='is gone'):
        checkpoint_to_resume(tmp_path)
