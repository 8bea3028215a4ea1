"""The compiled part: built once, loaded where it fits, and done without where it does not."""

import subprocess
import sys
import sysconfig
import weakref

import pytest
import runs
import torch
from torch import nn
from toys import Toy, seeded

from mmema import ExpMomentumEMA
from mmema.update import native
from mmema.update.direct import DirectFollower
from mmema.update.selection import Selection

needs_compiled_blend = pytest.mark.skipif(
    not hasattr(native.compiled, 'ContiguousPairs'),
    reason='needs `python -m mmema.build_native` on Linux',
)
needs_compiled = pytest.mark.skipif(
    native.compiled is None, reason='needs `python -m mmema.build_native`'
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.delenv('MMEMA_NATIVE', raising=False)
    return tmp_path


def test_the_library_is_of_one_source_one_python_and_one_torch(cache, monkeypatch):
    file = native.library()
    assert file.parent.parent == cache / 'mmema'
    assert file.parent.name.endswith(f'torch-{torch.__version__}')
    assert sysconfig.get_config_var('SOABI') in file.parent.name
    with monkeypatch.context() as context:
        context.setattr(native, 'FLAGS', ['-O1'])
        assert native.library() != file
    assert native.library() == file
    monkeypatch.setattr(native, 'SOURCE', cache / 'other.cpp')
    native.SOURCE.write_text('// another source')
    assert native.library() != file


def test_where_nothing_was_compiled_there_is_none(cache, recwarn):
    assert native.compiled_part() is None
    assert not recwarn.list


@needs_compiled
def test_it_can_be_left_out(monkeypatch):
    assert native.compiled_part() is not None
    monkeypatch.setenv('MMEMA_NATIVE', '0')
    assert native.compiled_part() is None


def test_a_file_cut_short_is_told_and_done_without(cache):
    file = native.library()
    file.parent.mkdir(parents=True)
    file.write_bytes(b'\x7fELF')
    with pytest.warns(UserWarning, match='goes on in Python: .* Compile it anew with `python -m'):
        assert native.compiled_part() is None


@needs_compiled
def test_an_update_uses_it():
    model = Toy()
    ema = ExpMomentumEMA(model)
    ema.update_parameters(model)
    follower = ema._follower
    assert type(follower._check) is native.compiled.StalenessCheck
    if sys.platform == 'linux':  # elsewhere torch's threads are others
        kind = native.compiled.ContiguousPairs
        assert [type(group) for group in follower._blended.compiled] == [kind]
        assert [type(group) for group in follower._copied.compiled] == [kind] * 2


@pytest.mark.slow
@needs_compiled
def test_it_is_compiled_whole_or_not_at_all(cache):
    command = [sys.executable, '-m', 'mmema.build_native']
    for _ in range(2):  # the second time there is nothing to do
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f'compiled: {native.library()}'
    assert [file.name for file in native.library().parent.iterdir()] == ['mmema_native.so']
    assert native.compiled_part() is not None


@needs_compiled
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


def frozen(*tensors):
    return nn.ParameterList([nn.Parameter(tensor, requires_grad=False) for tensor in tensors])


def follower_of(average, source):
    source.requires_grad_()
    return DirectFollower(average, source, Selection(update_buffers=False))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_compiled_blend
@pytest.mark.parametrize('number', [1, 2, 3])
@pytest.mark.parametrize('momentum', [0.0002, 0.3, 0.9])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_shares_that_end_within_a_tensor_are_bit_for_bit_lerp(dtype, momentum, number, threads):
    threads(number)
    generator = seeded(3)
    # Short ones fill more than one gathering; 512 is the longest of them.
    sizes = (1, 70_001, 3, 0, 99_999, 31, *[500] * 40, 512, 513, 50_000, 7, 40_013)
    source, average = (
        nn.ParameterList(
            [nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
        )
        for _ in range(2)
    )
    average.requires_grad_(False)
    expected = [a.clone().lerp_(s.detach(), momentum) for a, s in zip(average, source)]
    versions = [a._version for a in average]
    follower = follower_of(average, source)
    assert not follower._blended.fused
    follower.update(momentum)
    for tensor, right, version in zip(average, expected, versions):
        assert torch.equal(tensor, right)
        assert tensor._version > version
    assert not any(tensor.requires_grad for tensor in average)


@needs_compiled_blend
@pytest.mark.parametrize('number', [1, 2, 3])
def test_shares_that_end_within_a_tensor_are_copied(number, threads):
    threads(number)
    source, average = nn.Module(), nn.Module()
    for i, n in enumerate((5, 90_001, 0, 1, 77_777)):
        for module, value in ((source, torch.arange(n) + i), (average, torch.zeros(n).long())):
            module.register_buffer(f'numbers{i}', value)
    follower = follower_of(average, source)
    assert not follower._copied.fused
    follower.update(None)
    for mine, theirs in zip(average.buffers(), source.buffers()):
        assert torch.equal(mine, theirs)


@needs_compiled_blend
@pytest.mark.parametrize('side', [0, 1], ids=['average', 'source'])
def test_a_tensor_that_another_thread_shrinks_after_the_look_is_not_read(side):
    sides = [frozen(torch.full((2,), 2.0), torch.full((9,), 9.0)) for _ in range(2)]
    follower = follower_of(*sides)
    assert follower.holds(*sides)
    sides[side][1].data = torch.zeros(5)
    with pytest.raises(RuntimeError, match='while no other thread changes the model'):
        follower.update(0.25)
    assert sides[0][0].tolist() == [2, 2]


@needs_compiled_blend
def test_what_shares_memory_until_it_is_written_does_not_change():
    if not hasattr(torch, '_lazy_clone'):
        pytest.skip('this torch always copies')
    other = torch.zeros(2)
    sides = [frozen(torch.ones(2)) for _ in range(2)]
    sides[0][0].data = torch._lazy_clone(other)
    follower_of(*sides).update(0.25)
    assert (other.tolist(), sides[0][0].tolist()) == ([0, 0], [0.25, 0.25])


class Odd(nn.Parameter):
    """Not a plain parameter: it may keep its numbers anywhere."""


@needs_compiled_blend
@pytest.mark.parametrize(
    'source',
    [
        nn.Parameter(torch.ones(2, 3).t()),
        nn.Parameter(torch.ones(3, 2, dtype=torch.float64)),
        nn.Parameter(torch.ones(3, 2, dtype=torch.complex64)),
        nn.Parameter(torch._neg_view(torch.full((3, 2), -1.0))),
        Odd(torch.ones(3, 2)),
    ],
    ids=['transposed', 'double', 'complex', 'negative', 'a subclass'],
)
def test_what_is_not_a_plain_row_of_numbers_is_left_to_torch(source):
    dtype = torch.complex64 if source.is_complex() else torch.float32
    sides = [frozen(torch.zeros(3, 2, dtype=dtype)), nn.ParameterList([source])]
    follower = follower_of(*sides)
    assert not follower._blended.compiled
    with torch.no_grad():
        follower.update(0.25)
    assert torch.equal(sides[0][0], torch.full((3, 2), 0.25, dtype=dtype))


@needs_compiled_blend
def test_what_holds_no_numbers_of_its_own_is_left_to_torch():
    average, source = (frozen(torch.ones(4)) for _ in range(2))
    source[0].data = torch._efficientzerotensor((4,))
    follower = follower_of(average, source)
    assert not follower._blended.compiled
    follower.update(0.25)
    assert average[0].tolist() == [0.75] * 4


@needs_compiled_blend
def test_what_was_made_for_inference_is_blended_there_alone():
    with torch.inference_mode():
        average, source = frozen(torch.zeros(2)), frozen(torch.ones(2))
        follower = follower_of(average, source)
        follower.update(0.25)
    with pytest.raises(RuntimeError, match='outside InferenceMode'):
        follower.update(0.25)
    assert average[0].tolist() == [0.25] * 2


@needs_compiled_blend
def test_a_quantized_buffer_is_copied_with_its_scale():
    average, source = nn.Module(), nn.Module()
    for module, scale in ((average, 0.5), (source, 0.25)):
        numbers = torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), scale, 0, torch.qint8)
        module.register_buffer('numbers', numbers)
    follower_of(average, source).update(None)
    assert average.numbers.dequantize().tolist() == [1, 2]


@needs_compiled_blend
@pytest.mark.parametrize('side', ['average', 'source'])
@pytest.mark.parametrize(
    'change',
    [
        lambda data: data[:1],
        lambda data: data.t(),
        lambda data: data.view(2, 8),
        torch._neg_view,
        lambda data: data.view(torch.int32),
    ],
    ids=['shorter', 'transposed', 'another shape', 'negative', 'integers'],
)
def test_the_same_memory_seen_otherwise_is_noticed(change, side):
    source, average = (frozen(torch.ones(4, 4)) for _ in range(2))  # frozen, or never integers
    follower = DirectFollower(average, source, Selection(update_buffers=False))
    assert follower.holds(average, source)
    changed = average if side == 'average' else source
    changed[0].data = change(changed[0].data)
    assert not follower.holds(average, source)


@pytest.fixture
def log_of_a_run(tmp_path, monkeypatch):
    """Return a function that trains without the compiled part and gives the log."""

    def train(name):
        monkeypatch.setattr(native, 'compiled', None)
        runner = runs.make_runner(tmp_path / name, epochs=2, ema=dict(type='mmema.EMAHook'))
        runner.train()
        return runs.log_of(runner)

    native._say_once.cache_clear()
    yield train
    native._say_once.cache_clear()


def test_the_first_run_without_it_says_once_how_to_compile(log_of_a_run, monkeypatch):
    monkeypatch.delenv('MMEMA_NATIVE', raising=False)
    line = 'INFO - mmema updates the average in Python, with the same results and more slowly: '
    assert log_of_a_run('first').count(f'{line}`python -m mmema.build_native` compiles') == 1
    assert line not in log_of_a_run('second')


def test_a_run_in_which_it_is_turned_off_does_not(log_of_a_run, monkeypatch):
    monkeypatch.setenv('MMEMA_NATIVE', '0')
    assert 'build_native' not in log_of_a_run('off')


@needs_compiled
def test_layers_stay_as_long_as_compiled_code_has_their_addresses():
    model = nn.ModuleDict({'head': nn.Sequential(nn.Linear(4, 4))})
    ema = ExpMomentumEMA(model, momentum=0.5)
    ema.update_parameters(model)
    layer = weakref.ref(model['head'][0])
    model['head'] = None
    assert layer() is not None  # else the next layer could have its address, and pass for it
    model['head'] = nn.Sequential(nn.Linear(4, 4))
    ema.update_parameters(model)
    assert layer() is None
