# Faster R-CNN of MMDetection on the digits, a quarter as wide and with 18 layers. Its average
# restarts where the learning rate falls.
_base_ = ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', '../_base_/digits.py']

max_epochs, drop = 8, 6

width = 16  # of the first stage; the stock model has 64
model = dict(
    backbone=dict(
        depth=18,
        base_channels=width,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,  # the stock one downloads weights
    ),
    neck=dict(in_channels=[width, 2 * width, 4 * width, 8 * width], out_channels=32),
    # The boxes of the set are 7 to 56 pixels wide and 23 to 62 high.
    rpn_head=dict(in_channels=32, feat_channels=32, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=32),
        bbox_head=dict(in_channels=32, fc_out_channels=256, num_classes=10),
    ),
    # A picture has 2 to 6 digits, not the dozens of things of one of COCO.
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=100),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=100)),
)

pack = dict(
    type='PackDetInputs',
    meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
)
resize = dict(type='Resize', scale=_base_.digits_scale, keep_ratio=True)
train_pipeline = [
    *_base_.digits_load,
    dict(type='RandomResize', scale=_base_.digits_scale, ratio_range=(0.8, 1.25), keep_ratio=True),
    pack,
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='LoadAnnotations', with_bbox=True),
    pack,
]

train_dataloader = dict(
    batch_size=8,
    dataset=dict(**_base_.digits_train_set, pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        data_root=_base_.digits_root,
        metainfo=_base_.digits_metainfo,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    val_dataloader,
    dataset=dict(
        val_dataloader['dataset'], ann_file='annotations/test.json', data_prefix=dict(img='test/')
    ),
)
val_evaluator = _base_.digits_evaluator
test_evaluator = _base_.digits_test_evaluator

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=0.001, weight_decay=0.05),
    clip_grad=dict(max_norm=35),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type='MultiStepLR', by_epoch=True, milestones=[drop], gamma=0.1),
]
# 512 iterations, 128 of them after the restart: docs/restarts.md tells how both gammas are chosen.
custom_hooks = [
    dict(type='mmema.EMAHook', momentum=0.02, gamma=30, update_buffers=True),
    dict(type='mmema.EMARestartHook', milestones=[drop], gamma=15),
]
default_hooks = dict(
    logger=dict(interval=16),
    checkpoint=dict(interval=2, max_keep_ckpts=2, save_best='coco/bbox_mAP'),
)
train_cfg = dict(max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type='mmema.EMAValLoop')  # raw weights beside the averaged ones
randomness = dict(seed=0)
