"""Real models from MMYOLO's and MMDetection's shipped configs, built without downloads."""

from pathlib import Path

import pytest
import torch
from reference import ReferenceEMA, blended_names, tensors_of
from toys import seeded


def config_of(library, name):
    """Return a stock config; ``name`` is its path below ``configs``."""
    from mmengine.config import Config

    module = pytest.importorskip(library)
    return Config.fromfile(Path(module.__file__).parent / '.mim' / 'configs' / name)


def build(library, name):
    """Build a stock model; its random weights depend on torch's seed alone."""
    from mmengine.registry import MODELS, init_default_scope

    config = config_of(library, name)
    init_default_scope(library)
    without_downloads(config.model)
    return MODELS.build(config.model)


def without_downloads(config):
    """Drop pretrained weights from a config, wherever they stand."""
    if isinstance(config, dict):
        if isinstance(config.get('init_cfg'), dict) and config['init_cfg']['type'] == 'Pretrained':
            config['init_cfg'] = None
        for value in config.values():
            without_downloads(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            without_downloads(value)


@torch.no_grad()
def change(model, generator):
    """Change all that training changes, each tensor by numbers of its own, in one cheap pass."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        factor, shift = torch.randn(2, generator=generator).tolist()
        parameter.mul_(1 + factor / 10).add_(shift / 10)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(0.9).add_(torch.rand((), generator=generator).item())
        elif buffer.dtype != torch.bool:
            buffer.add_(1)


def follow(model, *classes, updates=5, momentum=0.1, gamma=3.0):
    """Average a model as `Runner.train()` does: first the average, then `init_weights`.

    Returns:
        The averages of the classes and the float64 reference, each as named tensors.
    """
    emas = [cls(model, momentum=momentum, gamma=gamma, update_buffers=True) for cls in classes]
    model.init_weights()
    reference = ReferenceEMA(tensors_of(model), blended_names(model, True), momentum, gamma)
    generator = seeded(1)
    for _ in range(updates):
        change(model, generator)
        for ema in emas:
            ema.update_parameters(model)
        reference.update(tensors_of(model))
    return [tensors_of(ema.module) for ema in emas], reference.average


def deviation(average, reference, names):
    """The largest distance of the named tensors, relative where the reference is above 1."""
    worst = 0.0
    for name in names:
        expected = reference[name].double()
        apart = (average[name].double() - expected).abs() / expected.abs().clamp(min=1)
        worst = max([worst, *([apart.max().item()] if apart.numel() else [])])
    return worst


# Every model of MMYOLO 0.6.0 that differs in a name or a shape from those before it, and builds
# without further packages (mmrazor, mmcls, mmrotate, mmpose). Found by tests/model_table.py --find.
MMYOLO = [
    'ppyoloe/ppyoloe_l_fast_8xb20-300e_coco.py',
    'ppyoloe/ppyoloe_m_fast_8xb28-300e_coco.py',
    'ppyoloe/ppyoloe_plus_l_fast_8xb8-80e_coco.py',
    'ppyoloe/ppyoloe_plus_m_fast_8xb8-80e_coco.py',
    'ppyoloe/ppyoloe_plus_s_fast_1xb12-40e_cat.py',
    'ppyoloe/ppyoloe_plus_s_fast_8xb8-80e_coco.py',
    'ppyoloe/ppyoloe_plus_x_fast_8xb8-80e_coco.py',
    'ppyoloe/ppyoloe_s_fast_8xb32-300e_coco.py',
    'ppyoloe/ppyoloe_x_fast_8xb16-300e_coco.py',
    'rtmdet/rtmdet-ins_s_syncbn_fast_8xb32-300e_coco.py',
    'rtmdet/rtmdet_l_syncbn_fast_8xb32-300e_coco.py',
    'rtmdet/rtmdet_m_syncbn_fast_8xb32-300e_coco.py',
    'rtmdet/rtmdet_s_syncbn_fast_8xb32-300e_coco.py',
    'rtmdet/rtmdet_tiny_fast_1xb12-40e_cat.py',
    'rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py',
    'rtmdet/rtmdet_x_syncbn_fast_8xb32-300e_coco.py',
    'yolov5/yolov5_l-p6-v62_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5_l-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5_m-p6-v62_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5_m-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5_n-p6-v62_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5_s-p6-v62_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5_s-v61_fast_1xb12-40e_608x352_cat.py',
    'yolov5/yolov5_s-v61_syncbn-detect_8xb16-300e_coco.py',
    'yolov5/yolov5_x-p6-v62_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5_x-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolov6/yolov6_l_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_m_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_n_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_s_fast_1xb12-40e_cat.py',
    'yolov6/yolov6_s_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_t_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_v3_l_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_v3_m_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_v3_n_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_v3_s_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_v3_t_syncbn_fast_8xb32-300e_coco.py',
    'yolov7/yolov7_d-p6_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_e-p6_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_e2e-p6_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_l_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_tiny_fast_1xb12-40e_cat.py',
    'yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_w-p6_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_x_syncbn_fast_8x16b-300e_coco.py',
    'yolov8/yolov8_l_mask-refine_syncbn_fast_8xb16-500e_coco.py',
    'yolov8/yolov8_m_mask-refine_syncbn_fast_8xb16-500e_coco.py',
    'yolov8/yolov8_n_mask-refine_syncbn_fast_8xb16-500e_coco.py',
    'yolov8/yolov8_s_fast_1xb12-40e_cat.py',
    'yolov8/yolov8_s_mask-refine_syncbn_fast_8xb16-500e_coco.py',
    'yolov8/yolov8_x_mask-refine_syncbn_fast_8xb16-500e_coco.py',
    'yolox/yolox_l_fast_8xb8-300e_coco.py',
    'yolox/yolox_m_fast_8xb32-300e-rtmdet-hyp_coco.py',
    'yolox/yolox_nano_fast_8xb32-300e-rtmdet-hyp_coco.py',
    'yolox/yolox_s_fast_1xb12-40e-rtmdet-hyp_cat.py',
    'yolox/yolox_s_fast_8xb32-300e-rtmdet-hyp_coco.py',
    'yolox/yolox_tiny_fast_8xb32-300e-rtmdet-hyp_coco.py',
    'yolox/yolox_x_fast_8xb8-300e_coco.py',
    'yolov5/ins_seg/yolov5_ins_l-v61_syncbn_fast_8xb16-300e_coco_instance.py',
    'yolov5/ins_seg/yolov5_ins_m-v61_syncbn_fast_8xb16-300e_coco_instance.py',
    'yolov5/ins_seg/yolov5_ins_n-v61_syncbn_fast_8xb16-300e_coco_instance.py',
    'yolov5/ins_seg/yolov5_ins_s-v61_syncbn_fast_8xb16-300e_balloon_instance.py',
    'yolov5/ins_seg/yolov5_ins_s-v61_syncbn_fast_8xb16-300e_coco_instance.py',
    'yolov5/ins_seg/yolov5_ins_x-v61_syncbn_fast_8xb16-300e_coco_instance.py',
    'yolov5/voc/yolov5_l-v61_fast_1xb32-50e_voc.py',
    'yolov5/voc/yolov5_m-v61_fast_1xb64-50e_voc.py',
    'yolov5/voc/yolov5_n-v61_fast_1xb64-50e_voc.py',
    'yolov5/voc/yolov5_s-v61_fast_1xb64-50e_voc.py',
    'yolov5/voc/yolov5_x-v61_fast_1xb32-50e_voc.py',
    'yolov5/yolov5u/yolov5u_l_mask-refine_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5u/yolov5u_m_mask-refine_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5u/yolov5u_n_mask-refine_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5u/yolov5u_s_mask-refine_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5u/yolov5u_x_mask-refine_syncbn_fast_8xb16-300e_coco.py',
]

MMDET = [
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'retinanet/retinanet_r50_fpn_1x_coco.py',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'ssd/ssd300_coco.py',
    'yolo/yolov3_d53_8xb8-320-273e_coco.py',
    'yolox/yolox_s_8xb8-300e_coco.py',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'solov2/solov2_r50_fpn_1x_coco.py',
    'detr/detr_r50_8xb2-150e_coco.py',
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
]

# One model for each set of layer types, small where there is a choice; each of MMDetection's has a
# set of its own.
ONE_OF_EACH = [
    'ppyoloe/ppyoloe_s_fast_8xb32-300e_coco.py',
    'rtmdet/rtmdet-ins_s_syncbn_fast_8xb32-300e_coco.py',
    'rtmdet/rtmdet_tiny_syncbn_fast_8xb32-300e_coco.py',
    'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    'yolov5/yolov5_s-v61_syncbn-detect_8xb16-300e_coco.py',
    'yolov6/yolov6_l_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_m_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_n_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_v3_l_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_v3_m_syncbn_fast_8xb32-300e_coco.py',
    'yolov6/yolov6_v3_n_syncbn_fast_8xb32-300e_coco.py',
    'yolov7/yolov7_e-p6_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_e2e-p6_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_l_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_tiny_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_w-p6_syncbn_fast_8x16b-300e_coco.py',
    'yolov7/yolov7_x_syncbn_fast_8x16b-300e_coco.py',
    'yolov8/yolov8_n_mask-refine_syncbn_fast_8xb16-500e_coco.py',
    'yolox/yolox_nano_fast_8xb32-300e-rtmdet-hyp_coco.py',
    'yolox/yolox_tiny_fast_8xb32-300e-rtmdet-hyp_coco.py',
    'yolov5/ins_seg/yolov5_ins_n-v61_syncbn_fast_8xb16-300e_coco_instance.py',
    'yolov5/yolov5u/yolov5u_n_mask-refine_syncbn_fast_8xb16-300e_coco.py',
    *MMDET,
]


def layer_types(model):
    return frozenset(type(module) for module in model.modules())
