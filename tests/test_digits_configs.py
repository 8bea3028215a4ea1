"""Each config of the digits trains for some iterations in a real Runner."""

import json
import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mmema
from mmema.run import ema_hook_of

pytest.importorskip('mmyolo')
ROOT = Path(__file__).resolve().parent.parent

import make_digits  # noqa: E402

LEAVES = sorted(path.stem for path in (ROOT / 'configs' / 'digits').glob('*_digits.py'))
EPOCHS = 3


@pytest.fixture(scope='module')
def tiny_set(tmp_path_factory):
    out = tmp_path_factory.mktemp('digits') / 'set'
    make_digits.make_digits(out, train=8, val=4, test=2)
    return f'{out}/'


@pytest.fixture(autouse=True)
def one_thread():
    # Several threads on pictures this small only wait for each other on a busy machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(leaf):
    return Config.fromfile(ROOT / 'configs' / 'digits' / f'{leaf}.py')


def short_run(leaf, data_root, work_dir):
    """Return the config for three epochs of two iterations, the last epochs without mosaic."""
    config = load(leaf)
    config.work_dir = str(work_dir)
    config.visualizer.name = str(work_dir)  # MMEngine makes only one of each name
    config.train_dataloader.dataset.data_root = data_root
    config.val_dataloader.dataset.data_root = data_root
    config.val_evaluator.ann_file = data_root + 'annotations/val.json'
    config.test_dataloader = config.test_evaluator = config.test_cfg = None
    config.train_dataloader.update(batch_size=4, num_workers=1)
    config.train_cfg.update(max_epochs=EPOCHS, val_interval=EPOCHS)
    config.default_hooks.checkpoint.interval = EPOCHS
    for hook in config.custom_hooks:
        if hook.type == 'mmdet.PipelineSwitchHook':
            hook.switch_epoch = 1
        elif hook.type == 'YOLOXModeSwitchHook':
            hook.num_last_epochs = 1  # it switches one epoch earlier than the name says: at 1
    return config


def test_the_four_families_are_there():
    assert LEAVES == [
        'rtmdet_tiny_digits',
        'yolov5_n_digits',
        'yolov8_n_digits',
        'yolox_nano_digits',
    ]


@pytest.mark.parametrize('leaf', LEAVES)
def test_what_a_config_says(leaf, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # from any folder
    config = load(leaf)
    for name in ('train', 'val', 'test'):
        dataset = config[f'{name}_dataloader'].dataset
        assert Path(dataset.data_root).resolve() == ROOT / 'data' / 'digits'
        assert dataset.metainfo.classes == tuple('0123456789')
    for name in ('val', 'test'):
        annotations = Path(config[f'{name}_evaluator'].ann_file).resolve()
        assert annotations == ROOT / 'data' / 'digits' / 'annotations' / f'{name}.json'
        assert config[f'{name}_dataloader'].dataset.ann_file == f'annotations/{name}.json'
        assert config[f'{name}_dataloader'].dataset.data_prefix.img == f'{name}/'
    assert config.model.bbox_head.head_module.num_classes == 10
    assigner = config.model.get('train_cfg', {}).get('assigner', {})
    assert assigner.get('num_classes', 10) == 10
    assert config.model.backbone.get('init_cfg') is None  # nothing to download
    steps = {step.type for step in config.train_dataloader.dataset.pipeline}
    assert not {'mmdet.Albu', 'mmdet.RandomFlip'} & steps
    assert config.randomness.seed == 0
    assert config.default_hooks.checkpoint.save_best == 'coco/bbox_mAP'
    (ema,) = (hook for hook in config.custom_hooks if hook.type == 'EMAHook')
    assert ema.ema_type == 'mmema.RestartableExpMomentumEMA'
    assert ema.update_buffers is True


@pytest.mark.parametrize('leaf', LEAVES)
def test_a_switch_leaves_the_last_epochs_without_mosaic(leaf):
    config = load(leaf)
    last = config.digits_plain_epochs
    assert config.train_cfg.max_epochs == config.digits_epochs
    (switch,) = (hook for hook in config.custom_hooks if 'Switch' in hook.type)
    if leaf.startswith('yolox'):
        assert (switch.type, switch.num_last_epochs) == ('YOLOXModeSwitchHook', last)
        pipeline = switch.new_train_pipeline
    else:
        assert switch.type == 'mmdet.PipelineSwitchHook'
        assert switch.switch_epoch == config.train_cfg.max_epochs - last
        pipeline = switch.switch_pipeline
    assert 'Mosaic' in [step.type for step in config.train_dataloader.dataset.pipeline]
    assert 'Mosaic' not in [step.type for step in pipeline]


def test_ema_warms_up_well_within_the_run():
    config = load('yolov5_n_digits')
    (ema,) = (hook for hook in config.custom_hooks if hook.type == 'EMAHook')
    iterations = config.digits_epochs * 512 // config.train_dataloader.batch_size
    assert ema.gamma * math.log(1 / ema.momentum) < iterations / 2
    assert 1 / ema.momentum < iterations / 4


class Watch(Hook):
    """Notes of each iteration its epoch and whether its pictures are the set's own.

    The boxes of the set are whole pixels; those that went through a mosaic are not. This looks at
    what the worker really made, not at the pipeline that the main process believes in.
    """

    def __init__(self):
        self.seen = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        boxes = data_batch['data_samples']['bboxes_labels'][:, 2:]
        assert len(boxes) > 0
        self.seen.append((runner.epoch, torch.equal(boxes, boxes.round())))

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        assert torch.isfinite(outputs['loss'])


@pytest.mark.slow
@pytest.mark.parametrize('leaf', LEAVES)
def test_trains_switches_and_averages(leaf, tiny_set, tmp_path):
    runner = Runner.from_cfg(short_run(leaf, tiny_set, tmp_path))
    watch = Watch()
    runner.register_hook(watch)
    runner.train()

    assert watch.seen == [(0, False)] * 2 + [(1, True)] * 2 + [(2, True)] * 2

    (hook,) = (hook for hook in runner.hooks if isinstance(hook, EMAHook))
    assert type(hook.ema_model) is mmema.RestartableExpMomentumEMA
    # The average restarts with the switch, before the epoch with index 1.
    assert hook.ema_model.restarts == 1
    assert int(hook.ema_model.steps) == 2 * (EPOCHS - 1)

    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    assert [line['step'] for line in lines if 'loss' in line] == [2, 4, 6]

    # The checkpoint holds the averaged weights as 'state_dict', and the trained ones beside them.
    checkpoint = torch.load(tmp_path / f'epoch_{EPOCHS}.pth')
    average, source = checkpoint['state_dict'], checkpoint['ema_state_dict']
    parameters = dict(runner.model.named_parameters())
    apart = [n for n in parameters if not torch.equal(average[n], source[f'module.{n}'])]
    assert len(apart) > len(parameters) / 2
    assert all(torch.equal(source[f'module.{n}'], value) for n, value in parameters.items())


@pytest.mark.slow
def test_several_averages_are_in_log_tensorboard_and_table(tiny_set, tmp_path):
    config = short_run('yolov5_n_several', tiny_set, tmp_path)
    swa = config.custom_hooks[0].also.swa
    assert swa.restart.milestones == [config.digits_switch_epoch]
    swa.restart.milestones = [1]  # where the short run switches
    runner = Runner.from_cfg(config)
    runner.train()
    also = ema_hook_of(runner).also
    assert [ema.restarts for ema in also.values()] == [0, 1, 1]
    (scalars,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in scalars.read_text().splitlines()]
    (metrics,) = (line for line in lines if 'coco/bbox_mAP' in line)
    events = EventAccumulator(f'{runner._log_dir}/vis_data').Reload()
    for name in ('', 'raw/', 'short/', 'restarted/', 'swa/'):
        metric = f'{name}coco/bbox_mAP'
        (event,) = events.Scalars(metric)
        assert event.value == pytest.approx(metrics[metric])  # a float32
    (log,) = tmp_path.glob('*/*.log')
    table = log.read_text().split('coco/bbox_mAP of all weights\n')[1].splitlines()
    names = [line.split()[0] for line in table[:6]]
    assert names == ['weights', 'ema', 'raw', 'short', 'restarted', 'swa']


def test_a_ladder_trains_with_nothing_chosen(tiny_set, tmp_path):
    config = short_run('yolov5_n_auto', tiny_set, tmp_path)
    config.train_cfg.val_interval = 1
    runner = Runner.from_cfg(config)
    runner.train()
    hook = ema_hook_of(runner)
    assert list(hook.rungs) == ['h30']  # of 6 updates
    log = next(tmp_path.glob('*/*.log')).read_text()
    table = log.split('the last score of each of the weights')[1].splitlines()[1:4]
    assert [line.split()[0] for line in table] == ['weights', 'raw', 'h30']
    assert sum('<- chosen' in line for line in table) == 1
