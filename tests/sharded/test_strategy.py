"""FullyShardStrategy: a sharded run has the bits of one in a single process, in all that it saves.

The ranks are real processes (gloo); each job runs several cases of ``shard_line.py``.
"""

import re
from pathlib import Path

import forks
import pytest
import torch
from marks import extensive
from runs import assert_same

import mmema
from mmema.checkpoints import folders, report
from mmema.checkpoints.export import export
from mmema.messages import RunError
from mmema.sharded.precision import cast_inputs, checked_policy
from mmema.sharded.refusals import refuse_old_torch

SCRIPT = Path(__file__).parents[1] / 'shard_line.py'
HAS_FSDP2 = hasattr(torch.distributed.fsdp, 'fully_shard')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_FSDP2, reason='torch 2.7 has FSDP2')]

ALIKE = ['adam', 'sgd', 'best', 'ladder', 'loaded', 'tested']  # in one process and sharded
REFUSED = {
    'plain_runner': 'Runner saves on rank 0 alone. Let runner_type=',
    'recalibrate': 'each rank has the average of its part alone. Leave the hook out',
    'wrong_pattern': "'layer.*' matches none, such as 'data_preprocessor', 'norm', 'layers'",
    'wrong_replicas': 'replicas must divide the number of ranks, 2, got 3',
    'drift': "after 4 iterations 'layers.0.weight' of the average 'short' differ. Look for code",
    'drift_of_replicas': "after 4 iterations 'layers.0.weight' of the average 'short' differ.",
    'tied_apart': "'layers.2.bias' and 'tied.first.bias' are one",
    'stock_hook': "FullyShardStrategy needs mmema.EMAHook, got MMEngine's EMAHook. Set type=",
}
TWO = ['from_alone', 'replicas', 'offload', 'ddp', 'split', 'bfloat16', 'folders', *REFUSED]


def run(world, root, cases, **environment):
    """Run cases on ranks; return the exit status of each and the output of the first."""
    work = root / f'job_{world}_{cases[0]}'
    work.mkdir()
    ranks = forks.start_ranks(world, SCRIPT, root / str(world), *cases, folder=work, **environment)
    return [rank.wait() for rank in ranks], (work / 'rank_0.txt').read_text()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Return a folder with the cases in ``1`` (one process without sharding), ``2`` and ``3``."""
    root = tmp_path_factory.mktemp('sharded')
    for name in ('1', '2', '3', 'alone'):
        (root / name).mkdir()
    for world, cases, environment in (
        (1, ALIKE, {'ALONE': '1'}),
        (2, [*ALIKE, *TWO], {}),
        (3, ['on_three'], {}),
    ):
        status, output = run(world, root, cases, **environment)
        assert status == [0] * world, output[-3000:]
    return root


def read(file):
    return folders.read(file) if file.is_dir() else torch.load(file, weights_only=False)


def flat(content, place=''):
    """Return the values of a checkpoint by their places; the order of the keys counts."""
    if isinstance(content, dict):
        keys = {f'{place} keys': list(content)} if place else {}
        for key, value in content.items():
            keys.update(flat(value, f'{place}.{key}'))
        return keys
    if isinstance(content, (list, tuple)):
        return flat(dict(enumerate(content)), place)
    return {place: content}


def assert_same_checkpoint(one, other):
    """Assert that two checkpoints are the same but for times and names of the run."""
    both = []
    for file in (one, other):
        content = read(file)
        meta, hub = content.pop('meta'), content.pop('message_hub')
        content['counted'] = [meta['epoch'], meta['iter'], meta['seed'], sorted(hub)]
        values = flat(content)
        # Means over other numbers of samples differ in their last bits.
        means = ('plateau.best', 'ema_auto.scores')
        both.append({k: v for k, v in values.items() if not any(mean in k for mean in means)})
    assert_same(*both)


# --- the proofs -----------------------------------------------------------------------------------


@pytest.mark.parametrize('case', ['adam', 'sgd', 'best', 'ladder', 'loaded'])
def test_two_ranks_save_what_one_process_saves(root, case):
    saved = sorted(path.name for path in (root / '1' / case).glob('*.pth'))
    assert saved == sorted(path.name for path in (root / '2' / case).glob('*.pth'))
    assert len(saved) == {'loaded': 2, 'best': 7}.get(case, 5)
    for name in saved:
        assert_same_checkpoint(root / '1' / case / name, root / '2' / case / name)


@pytest.mark.parametrize('case', ['adam', 'sgd', 'best', 'ladder', 'loaded'])
def test_two_ranks_log_what_one_process_logs(root, case):
    # Losses, the metrics of all weights, momentum, restarts, and the distance to the average.
    alone, sharded = (torch.load(root / n / f'{case}.pth', weights_only=False) for n in '12')
    assert set(alone) == set(sharded) and {'train/loss', 'train/ema_distance'} < set(alone)
    for name, values in alone.items():
        assert sharded[name] == pytest.approx(values, rel=1e-5, abs=1e-7), name


def test_two_ranks_test_what_one_process_tests(root):
    alone, sharded = (torch.load(root / n / 'tested.pth', weights_only=False) for n in '12')
    assert sharded['score'] == pytest.approx(alone['score'], rel=1e-6)


def test_two_ranks_go_on_where_one_process_stopped(root):
    assert_same_checkpoint(root / '1/adam/epoch_4.pth', root / '2/from_alone/epoch_4.pth')


@pytest.mark.parametrize('alone', [True, False])
def test_one_process_goes_on_where_two_ranks_stopped(root, alone):
    # Without sharding, and as the only rank of a sharded run.
    (root / '1/adam').rename(root / '1/kept')
    (root / '1/adam').symlink_to(root / '2/adam')
    try:
        status, output = run(1, root, ['from_ranks'], **({'ALONE': '1'} if alone else {}))
    finally:
        (root / '1/adam').unlink()
        (root / '1/kept').rename(root / '1/adam')
        (root / 'job_1_from_ranks').rename(root / f'job_{alone}')
    assert status == [0], output[-3000:]
    assert_same_checkpoint(root / '1/adam/epoch_4.pth', root / '1/from_ranks/epoch_4.pth')


@pytest.mark.parametrize('case', ['replicas', 'offload'])
def test_replicas_and_offload_change_no_bit(root, case):
    assert_same_checkpoint(root / '1/adam/epoch_2.pth', root / '2' / case / 'epoch_2.pth')


def test_with_other_data_on_each_rank_it_is_ddp(root):
    assert_same_checkpoint(root / '2/ddp/epoch_2.pth', root / '2/split/epoch_2.pth')
    with pytest.raises(AssertionError):
        assert_same_checkpoint(root / '1/adam/epoch_2.pth', root / '2/split/epoch_2.pth')


def test_buffers_that_drift_apart_are_named_once(root):
    for case, times in (('ddp', 1), ('split', 1), ('adam', 0)):
        log = ''.join(file.read_text() for file in (root / '2' / case).rglob('*.log'))
        text = "different buffers in the model: 'norm.running_mean', 'norm.running_var'"
        assert log.count(text) == times, case


def test_bf16_computes_with_float32_parts_and_average(root):
    assert torch.load(root / '2/bfloat16.pth', weights_only=False) == {'torch.float32'}


# --- checkpoints in folders -----------------------------------------------------------------------


@pytest.mark.parametrize('case', ['folders', 'folders_resumed'])
def test_folders_hold_what_the_usual_files_hold(root, case):
    saved = sorted(path.name for path in (root / '2' / case).glob('*.pth'))
    assert saved == sorted(path.name for path in (root / '2/best').glob('*.pth'))
    for name in saved:
        assert folders.is_folder(root / '2' / case / name)
        assert_same_checkpoint(root / '2/best' / name, root / '2' / case / name)
    assert not [path for path in (root / '2' / case).iterdir() if path.name.startswith('.')]


def test_each_rank_writes_its_part(root):
    files = sorted(path.name for path in (root / '2/folders/epoch_4.pth').iterdir())
    assert files == ['.metadata', '__0_0.distcp', '__1_0.distcp', 'rest.pth']


@pytest.mark.parametrize('case', ['adam', 'folders'])
def test_three_ranks_resume_what_two_have_saved(root, case):
    # The sum of three gradients rounds, so what comes after has other bits.
    assert_same_checkpoint(root / '2' / case / 'epoch_2.pth', root / '3/on_three' / f'{case}.pth')


def test_a_folder_can_be_inspected_and_exported(root, tmp_path):
    file, folder = (root / '2' / case / 'epoch_4.pth' for case in ('best', 'folders'))
    one, other = (
        [(key, re.sub(r'log \d+_\d+', 'log', text)) for key, text in report.inspect(path).lines()]
        for path in (folder, file)
    )
    assert one == other
    for weights in ('ema', 'raw', 'short'):
        outs = [
            export(path, tmp_path / f'{i}.pth', weights, named_by_hash=False, force=True)
            for i, path in enumerate((file, folder))
        ]
        states = [torch.load(out, weights_only=False)['state_dict'] for out in outs]
        assert_same(*states)


def test_nothing_in_a_folder_is_called(tmp_path):
    folder = tmp_path / 'epoch_1.pth'
    folder.mkdir()
    torch.save({'content': {}, 'places': []}, folder / 'rest.pth')
    # Protocol 0: call os.system; the second as an attribute of a module that may be read.
    for module, name in (('os', 'system'), ('torch.distributed.checkpoint.metadata', 'os.system')):
        call = f"c{module}\n{name}\n(S'touch {tmp_path}/called'\ntR."
        (folder / '.metadata').write_bytes(call.encode())
        with pytest.raises(mmema.checkpoints.formats.CheckpointError, match='refusing to read'):
            mmema.checkpoints.files.load(folder)
    assert not (tmp_path / 'called').exists()


# --- kills and mutations --------------------------------------------------------------------------


@pytest.mark.parametrize('case', ['killed_1', *extensive([['killed_0'], ['killed_1_in_folders']])])
def test_a_rank_that_is_killed_while_saving_leaves_the_last_checkpoint(root, tmp_path, case):
    (tmp_path / '2').mkdir()
    status, _ = run(2, tmp_path, [case])
    assert status[int(case[7])] == -9 and status[1 - int(case[7])] not in (0, None)
    left = sorted(path.name for path in (tmp_path / '2' / case).glob('epoch_*.pth'))
    assert left == ['epoch_1.pth', 'epoch_2.pth']
    status, output = run(2, tmp_path, ['after_kill'])
    assert status == [0, 0], output[-3000:]
    assert_same_checkpoint(root / '2/adam/epoch_4.pth', tmp_path / '2' / case / 'epoch_4.pth')


@pytest.mark.extensive
@pytest.mark.parametrize('case, epoch', [('without_reshard', 2), ('without_shape', 1)])
def test_the_proofs_see_the_mutations(root, case, epoch):
    # Weights that are written while the root is gathered; parts that count as equally large.
    run(2, root, [case])
    file = root / '2' / case / f'epoch_{epoch}.pth'
    if file.exists():  # else an error was raised
        with pytest.raises(AssertionError):
            assert_same_checkpoint(root / '2/adam' / file.name, file)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_work_is_refused_with_the_way_out(root, case):
    text = (root / '2' / f'{case}.txt').read_text()
    assert REFUSED[case] in text and '\n' not in text


@pytest.mark.parametrize(
    'arguments, error, match',
    [
        (dict(shard='neck'), TypeError, "shard must be a list of strings, got 'neck'"),
        (dict(shard=[1]), TypeError, r'shard must be a list of strings, got \[1\]'),
        (dict(replicas=0), ValueError, 'replicas must be at least 1, got 0'),
        (dict(cpu_offload=1), TypeError, 'cpu_offload must be True or False, got 1'),
        (dict(sharded_checkpoint=1), TypeError, 'sharded_checkpoint must be True or False'),
        (dict(mixed_precision='bf16'), TypeError, "must be a dict or None, got 'bf16'"),
        (dict(shards=['neck']), TypeError, 'shards'),
        (dict(), RunError, 'needs a launcher, got none: torchrun'),
    ],
)
def test_arguments_are_checked(tmp_path, arguments, error, match):
    with pytest.raises(error, match=match):
        mmema.FullyShardStrategy(**arguments, work_dir=str(tmp_path))


@pytest.mark.parametrize(
    'policy, match',
    [
        (dict(dtype='bfloat16'), "mixed_precision takes param_dtype, .*, got 'dtype'"),
        (dict(param_dtype='bf16'), "param_dtype must be a dtype such as 'bfloat16', got 'bf16'"),
        (dict(param_dtype='int8'), "param_dtype must be a dtype such as 'bfloat16', got 'int8'"),
    ],
)
def test_a_wrong_policy_is_refused(policy, match):
    with pytest.raises(ValueError, match=match):
        checked_policy(policy)


def test_a_policy_takes_names_and_dtypes():
    policy = checked_policy(dict(param_dtype='bfloat16', reduce_dtype=torch.float32))
    assert policy == dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def test_annotations_in_a_dict_are_not_rounded():
    # 511 in bf16 is 512. FSDP2's own cast rounds MMYOLO's boxes.
    x, number = torch.full((2,), 511.0), torch.tensor(3)
    args, kwargs = cast_inputs(torch.bfloat16, ([x, (x,)], {'bboxes': x}), {'y': x, 'n': number})
    assert args[0][0].dtype == args[0][1][0].dtype == kwargs['y'].dtype == torch.bfloat16
    assert args[1]['bboxes'] is x and kwargs['n'] is number


def test_an_old_torch_is_one_line(monkeypatch):
    monkeypatch.delattr('torch.distributed.fsdp.fully_shard')
    with pytest.raises(RunError, match=r'needs the FSDP2 of torch 2\.7, got torch'):
        refuse_old_torch()


# --- stock models ---------------------------------------------------------------------------------


@pytest.mark.extensive
@pytest.mark.parametrize('leaf', ['yolov5_n_digits', 'yolov8_n_digits', 'rtmdet_tiny_digits'])
def test_a_stock_model_that_is_sharded_has_the_bits_of_ddp(tmp_path, leaf):
    import make_digits

    make_digits.make_digits(tmp_path / 'set', train=8, val=4, test=2)
    script = SCRIPT.with_name('stock_line.py')
    ranks = forks.start_ranks(2, script, leaf, f'{tmp_path}/set/', folder=tmp_path)
    status = [rank.wait() for rank in ranks]
    assert status == [0, 0], (tmp_path / 'rank_0.txt').read_text()[-3000:]
    assert_same_checkpoint(tmp_path / 'ddp/epoch_3.pth', tmp_path / 'sharded/epoch_3.pth')
    # In bf16 numbers have 8 bits; after six steps the weights still are near those of float32. The
    # statistics of BatchNorm are of rounded features.
    for key in ('state_dict', 'ema_state_dict') if leaf != 'yolov8_n_digits' else ():
        whole, half = (read(tmp_path / name / 'epoch_3.pth')[key] for name in ('sharded', 'bf16'))
        assert {name: value.dtype for name, value in half.items()} == {
            name: value.dtype for name, value in whole.items()
        }
        names = [n for n, t in whole.items() if t.is_floating_point() and 'running' not in n]
        one, other = (torch.cat([s[name].flatten() for name in names]) for s in (whole, half))
        assert 0 < (one - other).norm() / one.norm() < 0.01
