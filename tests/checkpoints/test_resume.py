"""Choice of the file that a run is resumed from."""

import os
from types import SimpleNamespace

import pytest
import torch
from samples import Hostile

from mmema.checkpoints.probe import checkpoint_files, is_whole
from mmema.checkpoints.resume import KEPT, checkpoint_to_resume
from mmema.messages import RunError
from mmema.run import choose_checkpoint


def save(folder, name, age, optimizer=True, **content):
    """Write a checkpoint that is ``age`` seconds old."""
    file = folder / f'{name}.pth'
    torch.save({'optimizer': {}, **content} if optimizer else content, file)
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


def test_a_folder_as_deepspeed_writes_it(tmp_path):
    (tmp_path / 'epoch_3.pth').mkdir()
    note(tmp_path, tmp_path / 'epoch_3.pth')
    assert checkpoint_to_resume(tmp_path) == str(tmp_path / 'epoch_3.pth')


def test_a_file_in_the_older_format_of_torch(tmp_path):
    file = tmp_path / 'epoch_3.pth'
    torch.save({'a': torch.ones(99)}, file, _use_new_zipfile_serialization=False)
    note(tmp_path, file)
    assert checkpoint_to_resume(tmp_path) == str(file)


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
    with pytest.raises(RunError, match='epoch_1.pth is cut short, and no other one is whole'):
        checkpoint_to_resume(tmp_path)
    note(tmp_path, '')
    os.unlink(file)
    with pytest.raises(RunError, match='is gone'):
        checkpoint_to_resume(tmp_path)


def test_no_candidate_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'load', None)  # before 2.6 it refuses MMEngine's files
    expected = save(tmp_path, 'epoch_1', 20, state=Hostile(tmp_path / 'owned'))
    save(tmp_path, 'epoch_2', 10, optimizer=False, state=Hostile(tmp_path / 'owned'))
    note(tmp_path, tmp_path / 'epoch_3.pth')
    assert checkpoint_to_resume(tmp_path) == expected
    assert not (tmp_path / 'owned').exists()


def runner(folder, resume=True, load_from=None):
    return SimpleNamespace(work_dir=str(folder), _resume=resume, _load_from=load_from)


def test_a_run_that_resumes_gets_a_whole_file_once(tmp_path, warnings_seen):
    expected, named = save(tmp_path, 'epoch_1', 20), save(tmp_path, 'epoch_2', 10)
    cut(named)
    note(tmp_path, named)
    resumed = runner(tmp_path)
    for _ in range(2):
        choose_checkpoint(resumed)
        assert resumed._load_from == expected
    assert warnings_seen.text.count('is cut short') == 1


def test_a_run_that_names_its_file(tmp_path):
    file = save(tmp_path, 'epoch_1', 20)
    for resume in (True, False):
        named = runner(tmp_path, resume, file)
        choose_checkpoint(named)
        assert named._load_from == file
    cut(file)
    choose_checkpoint(runner(tmp_path, False, file))  # MMEngine loads, and says it, itself
    with pytest.raises(RunError, match='epoch_1.pth is cut short: .* Leave load_from out'):
        choose_checkpoint(runner(tmp_path, True, file))


def test_a_run_without_anything_to_resume_from(tmp_path):
    save(tmp_path, 'epoch_1', 20)
    for resume in (True, False):
        fresh = runner(tmp_path, resume)
        choose_checkpoint(fresh)
        assert fresh._load_from is None


def test_a_flexible_runner_that_names_its_file(tmp_path):
    named = runner(tmp_path, save(tmp_path, 'epoch_1', 20))
    note(tmp_path, save(tmp_path, 'epoch_2', 10))
    choose_checkpoint(named)
    assert named._load_from is None


@pytest.mark.parametrize('name', ['ck_{}.pt', 'model-{}.ckpt', 'step{}', 'epoch_{}.pth'])
def test_files_of_any_name(tmp_path, name):
    # As filename_tmpl of CheckpointHook gives them.
    for number in (1, 2):
        file = save(tmp_path, f'epoch_{number}', 30 - number)
        os.rename(file, tmp_path / name.format(number))
    first, second = (tmp_path / name.format(number) for number in (1, 2))
    note(tmp_path, second)
    (tmp_path / 'log.txt').write_text('PK')
    torch.save({'optimizer': {}}, tmp_path / 'unfinished.part')
    assert checkpoint_files(tmp_path) == [first, second]
    cut(second)
    assert checkpoint_files(tmp_path) == [first, second]
    assert checkpoint_to_resume(tmp_path) == str(first)
