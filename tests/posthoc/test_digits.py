"""Real trainings of YOLOv5-n on digits: what is made from their checkpoints, by the tools."""

import re

import make_digits
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner, load_checkpoint
from recorded import Record, Recorded, shares_of
from reference import assert_close, exp_momentum
from runs import ema_of
from tool_runs import CONFIG, ROOT, call_here, output_of

import mmema  # noqa: F401

pytestmark = pytest.mark.slow
LENGTH = 4  # iterations of an epoch
TOOL = 'posthoc'
STOCK = '[dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.1, gamma=5, priority=49, {})]'
OURS = """[
    dict(
        type='mmema.EMAHook',
        ema_type='mmema.RestartableConstantEMA',
        momentum=0.1,
        update_buffers=True,
        also=dict(
            r=dict(ema_type='mmema.RestartableDebiasedEMA', restart=dict(milestones=[1])),
        ),
    )
]"""


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits') / 'set'
    make_digits.make_digits(folder, train=16, val=8, test=8)
    return folder


def config_file(folder, data, hooks, epochs=2):
    """Write a config of a few iterations on a few pictures, with these hooks alone."""
    splits = {
        split: f"""
{split}_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(data_root='{data}')
)
"""
        for split in ('train', 'val', 'test')
    }
    for split in ('val', 'test'):
        splits[split] += f"{split}_evaluator = dict(ann_file='{data}/annotations/{split}.json')"
    file = folder / 'config.py'
    file.write_text(
        f"""
_base_ = '{CONFIG}'
{''.join(splits.values())}
custom_hooks = {hooks}
train_cfg = dict(max_epochs={epochs}, val_begin=99)
val_cfg = dict(_delete_=True, type='ValLoop')
default_hooks = dict(
    checkpoint=dict(interval=1, max_keep_ckpts=-1, save_best=None),
    param_scheduler=dict(max_epochs={epochs}, warmup_mim_iter=1),
)
"""
    )
    return file


def train(folder, data, hooks):
    """Train, and record the raw weights after each iteration."""
    file = config_file(folder, data, hooks)
    config = Config.fromfile(file)
    config.work_dir = str(folder / 'w')
    runner = Runner.from_cfg(config)
    recorder = Record()
    runner.register_hook(recorder, 'VERY_HIGH')
    runner.train()
    return Recorded(runner, recorder.states), file


@pytest.fixture(scope='module')
def stock(data, tmp_path_factory):
    """A run with MMEngine's hook and MMYOLO's average alone, in its warm-up."""
    return train(tmp_path_factory.mktemp('stock'), data, STOCK.format('update_buffers=True'))


@pytest.fixture(scope='module')
def pair(stock, tmp_path_factory):
    """The file that the README's command makes, its folder, and what was printed."""
    run, file = stock
    folder = tmp_path_factory.mktemp('pair')
    call = [TOOL, 'restart', run.file(1), run.file(2), '-o', 'restarted.pth']
    return folder, output_of(*call, folder=folder)


def test_restart_of_a_run_by_stock_classes(stock, pair):
    run, _ = stock
    folder, printed = pair
    momenta = [exp_momentum(t, 0.1, 5) if t else 1.0 for t in range(8)]
    shares = shares_of(momenta)[LENGTH:]
    expected = run.sum([0] * LENGTH + [share / sum(shares) for share in shares])
    expected.update({n: t for n, t in run.states[-1].items() if not t.is_floating_point()})
    state = torch.load(folder / 'restarted.pth', weights_only=True)['state_dict']
    assert_close(state, expected, rtol=1e-5)
    assert 'as if restarted hard after epoch 1, at epoch 2' in printed
    assert re.search(r'updates +4 between the files\nW +0\.\d+ of the later average', printed)


def test_what_is_written_is_loaded_by_mmengine_and_the_test_tool(stock, pair):
    run, file = stock
    folder, _ = pair
    model = run.runner.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_checkpoint(model, str(folder / 'restarted.pth'), map_location='cpu', strict=True)
    state = torch.load(folder / 'restarted.pth', weights_only=True)['state_dict']
    assert all(torch.equal(tensor, state[n]) for n, tensor in model.state_dict().items())
    model.load_state_dict(before)
    assert 'restarted.pth:' in output_of('test', file, 'restarted.pth', folder=folder)
    assert (
        'exported by mmema: weights ema, made restart, after epoch 1, at epoch 2, kept 0.1'
        in output_of('inspect', 'restarted.pth', folder=folder)
    )


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # of the exporter, wanted by MMDeploy
def test_onnx_runtime_gives_what_the_average_gives(stock, tmp_path, monkeypatch):
    """The commands of docs/checkpoints.md, 'Ship it as ONNX', on this run."""
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnx')
    run, file = stock
    monkeypatch.chdir(tmp_path)
    call = ['export', run.file(2), '-o', 'digits.pth', '--exact-name']
    call_here(*call, folder=tmp_path)
    page = (ROOT / 'docs' / 'checkpoints.md').read_text()
    (block,) = re.findall(r'```python\n([^`]*torch\.onnx[^`]*)```', page)
    block = block.replace('configs/digits/yolov5_n_digits.py', str(file))
    exec(block.replace('digits-a9525954.pth', 'digits.pth'), {})

    picture = torch.rand(1, 3, 128, 128)
    session = runtime.InferenceSession('digits.onnx', providers=['CPUExecutionProvider'])
    (name,) = (given.name for given in session.get_inputs())
    found = [torch.from_numpy(out) for out in session.run(None, {name: picture.numpy()})]
    average, raw = outputs(ema_of(run.runner).module, picture), outputs(run.runner.model, picture)
    assert [out.shape for out in found] == [out.shape for out in average]
    assert largest_difference(found, average) < 1e-5
    assert largest_difference(found, raw) > 1e-3


@torch.no_grad()
def outputs(model, picture):
    """Return class scores, boxes and objectness of each of the three levels."""
    return [level for kind in model.eval()(picture) for level in kind]


def largest_difference(first, second):
    return max((one - other).abs().max().item() for one, other in zip(first, second))


@pytest.mark.extensive  # test_derive.py has the same with a toy
def test_restart_equals_the_average_that_was_restarted_in_the_run(data, tmp_path):
    run, _ = train(tmp_path, data, OURS)
    call_here(TOOL, 'restart', run.file(1), run.file(2), '-o', 'made.pth', folder=tmp_path)
    made = torch.load(tmp_path / 'made.pth', weights_only=True)['state_dict']
    content = torch.load(run.file(2), weights_only=True)
    real = content['ema_also']['r']['state_dict']
    real = {n[7:]: t for n, t in real.items() if n.startswith('module.')}
    expected = {n: t.double() if t.is_floating_point() else t for n, t in real.items()}
    # Rounded to float32 at each update, here enlarged 1 / (1 - 0.9 ** 4) = 2.9 times.
    assert_close(made, expected, rtol=1e-5, atol=1e-6)
    main = content['state_dict']
    apart = max((main[n] - t).abs().max() for n, t in real.items() if t.is_floating_point())
    assert apart > 1e-3


@pytest.mark.extensive  # cli/test_posthoc.py has the same with a toy
def test_choose(stock, tmp_path, capsys):
    run, file = stock
    call = [TOOL, 'choose', run.folder, '--config', file, '-o', 'best.pth', '--restart-at', 1]
    call_here(*call, '--batches', 1, '--report-config', file, folder=tmp_path)
    printed = capsys.readouterr().out
    rows = re.findall(r'^[* ] (.*?)  +(\d+\.\d%)? +(-|\d\.\d{4})$', printed, re.M)
    labels = [row[0] for row in rows]
    assert labels[:2] == ['ema', 'raw']
    assert 'mean of the last 2 raw weights' in labels
    assert any(label.endswith(', restarted at epoch 1') for label in labels)
    best = torch.load(tmp_path / 'best.pth', weights_only=True)['meta']['mmema']
    assert best['metric'] == 'coco/bbox_mAP' and best['candidates'] == len(rows)
    assert best['score'] == max(float(score) for *_, score in rows if score != '-')
    assert re.search(
        r'coco/bbox_mAP on the test set of config.py: \d\.\d{4}  ema as stored', printed
    )
    assert 'best.pth:' in output_of('test', file, 'best.pth', folder=tmp_path)
