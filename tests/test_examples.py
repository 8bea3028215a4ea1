"""Each example of the README, as its reader starts it, on few pictures for few iterations."""

import importlib.util
import json
import re

import make_digits
import pytest
import torch
from runs import averages_of, ema_hook_of, log_of, points
from tool_runs import ROOT, call_forked, call_here, output_of, refusal

import mmema

CONFIGS = ROOT / 'configs' / 'digits'
MMENGINE = ROOT / 'examples' / 'mmengine_digits.py'

# Two stages of two iterations each, with the restart between them.
SHORT = {
    'mmdet_faster_rcnn_r18': {
        'train_dataloader.batch_size': 4,
        'train_cfg.max_epochs': 2,
        'train_cfg.val_interval': 2,
        'param_scheduler.1.milestones': [1],
        'custom_hooks.1.milestones': [1],
        'default_hooks.checkpoint.interval': 2,
        'default_hooks.logger.interval': 2,
    },
    'mmpretrain_resnet18': {
        'train_dataloader.batch_size': 8,
        'train_dataloader.dataset.indices': 16,
        'train_cfg.max_epochs': 2,
        'train_cfg.val_interval': 2,
        'custom_hooks.0.schedule.0.action_epoch': 2,
        'default_hooks.checkpoint.interval': 2,
        'default_hooks.logger.interval': 2,
    },
    'mmseg_unet': {
        'train_dataloader.batch_size': 4,
        'train_cfg.max_iters': 4,
        'train_cfg.val_interval': 4,
        'param_scheduler.1.milestones': [2],
        'custom_hooks.1.milestones': [2],
        'default_hooks.checkpoint.interval': 4,
        'default_hooks.logger.interval': 2,
    },
}
GAMMAS = {'mmdet_faster_rcnn_r18': 15, 'mmpretrain_resnet18': 10, 'mmseg_unet': 10}
METRICS = {
    'mmdet_faster_rcnn_r18': 'coco/bbox_mAP',
    'mmpretrain_resnet18': 'accuracy/top1',
    'mmseg_unet': 'mIoU',
}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits') / 'set'
    make_digits.make_digits(folder, train=8, val=4, test=4)
    return folder


def options_of(name, data):
    options = {
        **{f'{split}_dataloader.dataset.data_root': data for split in ('train', 'val', 'test')},
        'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        **SHORT[name],
    }
    if name == 'mmdet_faster_rcnn_r18':
        for split in ('val', 'test'):
            options[f'{split}_evaluator.ann_file'] = f'{data}/annotations/{split}.json'
    return ['--cfg-options', *(f'{key}={value}'.replace(' ', '') for key, value in options.items())]


def trained(name, data, folder):
    """Run tools/train.py; return its output, the scalars of its validation and its checkpoint."""
    pytest.importorskip(name.partition('_')[0])
    config = CONFIGS / f'{name}.py'
    done = call_forked('train', config, '--work-dir', 'w', *options_of(name, data), folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (folder / 'w').glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    (scores,) = (line for line in lines if METRICS[name] in line)
    (last,) = [*(folder / 'w').glob('epoch_2.pth'), *(folder / 'w').glob('iter_4.pth')]
    return done.stdout + done.stderr, scores, last


def check_run(name, output, scores, file):
    """The average restarted after two iterations of four; raw and averaged were evaluated."""
    metric = METRICS[name]
    assert 0 <= scores[metric] <= 100 and 0 <= scores[f'raw/{metric}'] <= 100
    for weights in ('EMA', 'raw'):
        assert f'{metric} of the {weights} weights' in output
    moment = 'iter 2' if name == 'mmseg_unet' else 'epoch 1'
    assert f'iter 2 (due: {moment}): steps 2 -> 0, momentum ' in output
    checkpoint = torch.load(file)
    state, average = checkpoint['ema_state_dict'], checkpoint['state_dict']
    assert (int(state['steps']), int(state['restarts']), float(state['gamma'])) == (
        2,
        1,
        GAMMAS[name],
    )
    raw = {key[7:]: value for key, value in state.items() if key.startswith('module.')}
    assert set(raw) == set(average)
    assert any(not torch.equal(raw[key], average[key]) for key in raw)


@pytest.mark.slow
def test_mmdetection_with_a_restart_where_the_learning_rate_falls(data, tmp_path):
    name = 'mmdet_faster_rcnn_r18'
    check_run(name, *trained(name, data, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mmpretrain_resnet18', 'mmseg_unet'])
def test_other_libraries_train_and_test(name, data, tmp_path):
    output, scores, file = trained(name, data, tmp_path)
    check_run(name, output, scores, file)
    if name == 'mmpretrain_resnet18':
        switched = [
            line for line in output.splitlines() if 'at epoch 2' in line or 'EMA re' in line
        ]
        words = ('Switch batch augments', 'Switch train pipeline', 'EMA restart 1 at epoch 1')
        assert len(switched) == 3
        assert all(word in line for word, line in zip(words, switched))
    call = (CONFIGS / f'{name}.py', '--iters-per-epoch', 32, '-o', 'plan.png')
    call_here('plot', *call, folder=tmp_path)
    # The test set is that of the validation here, and the file has the averaged weights.
    options = [*options_of(name, data), *as_validated(name)]
    call = (CONFIGS / f'{name}.py', file, '--work-dir', 't', '--out', 'p.pkl', *options)
    printed = output_of('test', *call, folder=tmp_path)
    metric = METRICS[name]
    (found,) = re.findall(rf'^ +{metric} +([\d.]+)$', printed, re.M)
    assert float(found) == pytest.approx(scores[metric], abs=1e-3)
    assert (tmp_path / 'p.pkl').stat().st_size > 0


def as_validated(name):
    if name == 'mmpretrain_resnet18':
        return ['test_dataloader.dataset.data_prefix=crops/val']
    return [
        'test_dataloader.dataset.data_prefix.img_path=val',
        'test_dataloader.dataset.data_prefix.seg_map_path=masks/val',
    ]


def test_mmengine_alone(tmp_path):
    pytest.importorskip('sklearn')
    spec = importlib.util.spec_from_file_location('mmengine_digits', MMENGINE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    runner = example.make_runner(str(tmp_path), epochs=2, drop=1)
    runner.train()
    (ema,) = averages_of(ema_hook_of(runner)).values()
    assert isinstance(ema, mmema.RestartableExpMomentumEMA)
    assert (int(ema.steps), ema.restarts) == (45, 1)  # of 1,436 pictures in batches of 32
    scores = [point for point in points(runner) if 'accuracy' in point]
    assert [point['step'] for point in scores] == [1, 2]
    assert all(point['accuracy'] > 0.7 and point['raw/accuracy'] > 0.7 for point in scores)
    assert 'accuracy of all weights' in log_of(runner)


@pytest.mark.parametrize(
    ('name', 'package'),
    [('mmpretrain_resnet18', 'mmpretrain'), ('mmseg_unet', 'mmsegmentation')],
)
def test_a_library_that_is_not_there_is_one_line(name, package, tmp_path):
    if importlib.util.find_spec(name.partition('_')[0]):
        pytest.skip(f'{package} is installed')
    line = refusal('train', CONFIGS / f'{name}.py', folder=tmp_path)
    assert line.startswith(f'mmema train: {CONFIGS / name}.py cannot be read: ')
    assert f'{package} is not installed' in line and 'docs/stacks.md' in line
