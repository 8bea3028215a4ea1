"""Averages of models of other libraries in their own runs; `make stacks` installs them."""

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner
from reference import ReferenceEMA, assert_close, blended_names, tensors_of
from runs import ema_of, points
from torch.utils.data import Dataset

pytestmark = pytest.mark.slow
BATCH, LENGTH = 4, 16


class Twin(Hook):
    """The float64 reference beside the average, restarted before the second epoch."""

    priority = 'LOWEST'

    def before_train(self, runner):
        blended = blended_names(runner.model, update_buffers=True)
        self.reference = ReferenceEMA(tensors_of(runner.model), blended, 0.1, 3)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == LENGTH // BATCH:
            self.reference.restart(steps=0, gamma=2)
        self.reference.update(tensors_of(runner.model))


def test_mmsegmentation_with_a_restart(tmp_path):
    pytest.importorskip('mmseg')
    datasets = pytest.importorskip('sklearn.datasets')
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    class Digits(Dataset):
        """Handwritten digits, each with the mask of its ink."""

        METAINFO = metainfo = dict(classes=('paper', 'ink'), palette=[[0] * 3, [255] * 3])

        def __init__(self):
            self.images = torch.from_numpy(datasets.load_digits().images[:LENGTH])

        def __len__(self):
            return LENGTH

        def __getitem__(self, index):
            large = self.images[index].repeat_interleave(4, 0).repeat_interleave(4, 1)
            shape = dict(img_shape=large.shape, ori_shape=large.shape, pad_shape=large.shape)
            sample = SegDataSample(metainfo=shape)
            sample.gt_sem_seg = PixelData(data=(large > 8).long()[None])
            return dict(inputs=large.expand(3, -1, -1).float(), data_samples=sample)

    norm = dict(type='BN')
    twin = Twin()
    data = dict(batch_size=BATCH, dataset=Digits(), collate_fn=dict(type='pseudo_collate'))
    runner = Runner(
        model=dict(
            type='EncoderDecoder',
            data_preprocessor=dict(
                type='SegDataPreProcessor', mean=[5] * 3, std=[6] * 3, size_divisor=32
            ),
            backbone=dict(
                type='ResNetV1c', depth=18, base_channels=4, stem_channels=4, norm_cfg=norm
            ),
            decode_head=dict(
                type='FCNHead',
                in_channels=32,
                channels=8,
                num_convs=1,
                concat_input=False,
                num_classes=2,
                norm_cfg=norm,
                init_cfg=None,
            ),
            test_cfg=ConfigDict(mode='whole'),
        ),
        work_dir=str(tmp_path),
        train_dataloader=dict(data, sampler=dict(type='DefaultSampler', shuffle=True)),
        val_dataloader=dict(data, sampler=dict(type='DefaultSampler', shuffle=False)),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        val_cfg=dict(type='mmema.EMAValLoop'),
        val_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        custom_hooks=[
            dict(
                type='EMAHook',
                ema_type='mmema.RestartableExpMomentumEMA',
                momentum=0.1,
                gamma=3,
                update_buffers=True,
            ),
            dict(type='mmema.EMARestartHook', milestones=[1], gamma=2),
            twin,
        ],
        default_scope='mmseg',
        randomness=dict(seed=0),
    )
    runner.train()
    ema = ema_of(runner)
    assert (int(ema.steps), ema.restarts, ema.gamma) == (LENGTH // BATCH, 1, 2)
    assert_close(tensors_of(ema.module), twin.reference.average, rtol=1e-5, atol=1e-5)
    scores = [point for point in points(runner) if 'mIoU' in point]
    assert scores and all('raw/mIoU' in point for point in scores)
