"""The compiled part: built once, loaded where it fits, and done without where it does not."""

import subprocess
import sys

import pytest
import torch
from toys import Toy

from mmema import ExpMomentumEMA, native

compiled = pytest.mark.skipif(native.Watch is None, reason='needs `python -m mmema.build_native`')


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    return tmp_path


def test_the_library_is_of_one_source_one_python_and_one_torch(cache, monkeypatch):
    file = native.library()
    assert file.parent.parent == cache / 'mmema'
    assert file.parent.name.endswith(f'torch-{torch.__version__}')
    assert sys.implementation.cache_tag in file.parent.name
    monkeypatch.setattr(native, 'SOURCE', cache / 'other.cpp')
    native.SOURCE.write_text('// another source')
    assert native.library() != file


def test_where_nothing_was_compiled_there_is_none(cache, recwarn):
    assert native.watch_class() is None
    assert not recwarn.list


@compiled
def test_it_can_be_left_out(monkeypatch):
    assert native.watch_class() is not None
    monkeypatch.setenv('MMEMA_NATIVE', '0')
    assert native.watch_class() is None


def test_a_file_cut_short_is_told_and_done_without(cache):
    file = native.library()
    file.parent.mkdir(parents=True)
    file.write_bytes(b'\x7fELF')
    with pytest.warns(UserWarning, match='goes on in Python: .* Compile it anew with `python -m'):
        assert native.watch_class() is None


@compiled
def test_an_update_uses_it():
    model = Toy()
    ema = ExpMomentumEMA(model)
    ema.update_parameters(model)
    assert [type(watch) for watch in ema._pairing.watches] == [native.Watch]


@pytest.mark.slow
@compiled
def test_it_is_compiled_whole_or_not_at_all(cache):
    command = [sys.executable, '-m', 'mmema.build_native']
    for _ in range(2):  # the second time there is nothing to do
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f'compiled: {native.library()}'
    assert [file.name for file in native.library().parent.iterdir()] == ['mmema_native.so']
    assert native.watch_class() is not None


@compiled
def test_a_swapped_tensor_is_seen():
    # torch.utils.swap_tensors leaves every Python object in its place.
    if not hasattr(torch.utils, 'swap_tensors'):
        pytest.skip('torch 2.2 and earlier cannot swap')
    model = Toy()
    ema = ExpMomentumEMA(model, 0.25, 1e-3)
    ema.update_parameters(model)
    ema.update_parameters(model)
    other = torch.nn.Parameter(torch.full((3,), 9.0, dtype=torch.float64))
    torch.utils.swap_tensors(model.norm.bias, other)
    ema.update_parameters(model)
    assert torch.equal(ema.module.norm.bias, torch.full((3,), 2.25))
