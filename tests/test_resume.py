"""Which file a run goes on from."""

import pytest
import torch

from mmema.resume import checkpoint_to_resume, is_whole


def save(file, iteration, optimizer=True):
    torch.save(dict(meta=dict(iter=iteration), **({'optimizer': {}} if optimizer else {})), file)


def cut(file):
    file.write_bytes(file.read_bytes()[:-30])
    assert not is_whole(file)


def note(folder, text):
    (folder / 'last_checkpoint').write_text(str(text))


def test_the_one_that_mmengine_names(tmp_path):
    save(tmp_path / 'epoch_1.pth', 10)
    save(tmp_path / 'epoch_2.pth', 20)
    assert checkpoint_to_resume(tmp_path) is None  # no run has finished a checkpoint here
    note(tmp_path, tmp_path / 'epoch_1.pth')
    assert checkpoint_to_resume(tmp_path) == tmp_path / 'epoch_1.pth'


def test_a_folder_that_was_moved(tmp_path):
    save(tmp_path / 'epoch_1.pth', 10)
    note(tmp_path, '/somewhere/else/epoch_1.pth')
    assert checkpoint_to_resume(tmp_path) == tmp_path / 'epoch_1.pth'


@pytest.mark.parametrize('break_it', [cut, lambda file: file.unlink()])
def test_the_furthest_whole_one_with_an_optimizer_if_that_is_broken(tmp_path, break_it):
    for number in (1, 2, 3):
        save(tmp_path / f'epoch_{number}.pth', 10 * number)
    save(tmp_path / 'best_without_optimizer.pth', 30, optimizer=False)
    (tmp_path / 'foreign.pth').write_bytes(b'no checkpoint')
    torch.save([1, 2], tmp_path / 'list.pth')
    note(tmp_path, tmp_path / 'epoch_3.pth')
    break_it(tmp_path / 'epoch_3.pth')
    assert checkpoint_to_resume(tmp_path) == tmp_path / 'epoch_2.pth'


def test_none_left_is_an_error(tmp_path):
    save(tmp_path / 'epoch_1.pth', 10)
    note(tmp_path, tmp_path / 'epoch_1.pth')
    cut(tmp_path / 'epoch_1.pth')
    with pytest.raises(ValueError, match='epoch_1.pth is cut short, and no other one is whole'):
        checkpoint_to_resume(tmp_path)
    note(tmp_path, '')
    (tmp_path / 'epoch_1.pth').unlink()
    with pytest.raises(ValueError, match='is gone'):
        checkpoint_to_resume(tmp_path)
