"""A stock YOLOv6-n, tested in deploy form as `tools/test.py --deploy` of MMYOLO does."""

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.runner import Runner
from torch.utils.data import Dataset
from zoo import build

import mmema

pytest.importorskip('mmyolo')
from mmdet.structures import DetDataSample
from mmyolo.engine.hooks import SwitchToDeployHook

YOLOV6_N = 'yolov6/yolov6_n_syncbn_fast_8xb32-300e_coco.py'


class Picture(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        picture = torch.randint(256, (3, 64, 64), generator=torch.Generator().manual_seed(0))
        sample = DetDataSample(
            metainfo=dict(ori_shape=(64, 64), img_shape=(64, 64), scale_factor=(1.0, 1.0), img_id=0)
        )
        return dict(inputs=picture.to(torch.uint8), data_samples=sample)


class Boxes(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [sample['pred_instances']['scores'].sum() for sample in data_samples]

    def compute_metrics(self, results):
        return dict(scores=float(sum(results)))


def run_with(hook, tmp_path, file, deploy, number):
    model = build('mmyolo', YOLOV6_N)
    model.bbox_head.test_cfg.update(score_thr=0.0, multi_label=False)
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        test_dataloader=dict(
            batch_size=1,
            num_workers=0,
            dataset=Picture(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        ),
        test_cfg=dict(),
        test_evaluator=[Boxes()],
        custom_hooks=[hook, *([SwitchToDeployHook()] if deploy else [])],
        default_scope='mmyolo',
        load_from=file,
        experiment_name=f'deploy_{number}',
    )
    return runner, runner.test()['scores']


@pytest.mark.slow
def test_8_yolov6_in_deploy_form(tmp_path):
    # mmengine 0.10.7 exchanges tensors in the order they happen to have: their shapes differ.
    model = build('mmyolo', YOLOV6_N)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 2)
    file = str(tmp_path / 'weights.pth')
    torch.save(dict(state_dict=model.state_dict()), file)

    def score_by(cls, deploy, number):
        return run_with(cls(ema_type='mmema.ExpMomentumEMA'), tmp_path, file, deploy, number)

    _, expected = score_by(mmema.EMAHook, False, 0)
    runner, scores = score_by(mmema.EMAHook, True, 1)
    assert any('rbr_reparam' in name for name in runner.model.state_dict())
    assert scores == pytest.approx(expected, rel=1e-3) and expected > 0
    with pytest.raises(RuntimeError, match='size'):
        score_by(StockEMAHook, True, 2)
