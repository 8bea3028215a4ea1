# The digits set (tools/make_digits.py) and what every run on it shares. All names here begin with
# `digits_`: the stock configs beside which this file stands use the plain ones, and MMEngine takes
# no name twice among the bases of a config.

# Absolute, so that a config works from any folder; for an installed package, which must not be
# written into, in the folder of the run.
digits_root = '{{ fileDirname }}/../../data/digits/'
if '/.mim/' in '{{ fileDirname }}':
    digits_root = 'data/digits/'
digits_metainfo = dict(classes=tuple('0123456789'))
digits_scale = (128, 128)  # width, height of a picture

# Pipelines ------------------------------------------------------------------------------------
digits_load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]

# The families' own, but for two steps: mmdet.Albu asks for a package that the stack does not have,
# and mmdet.RandomFlip makes of a digit what nobody writes.
digits_pack = dict(
    type='mmdet.PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape')
)

# The last epochs of all families.
digits_plain_pipeline = [*digits_load, dict(type='YOLOv5HSVRandomAug'), digits_pack]

# The first stage of YOLOv5 and YOLOv8.
digits_mosaic_pipeline = [
    *digits_load,
    dict(type='Mosaic', img_scale=digits_scale, pad_val=114.0, pre_transform=digits_load),
    dict(
        type='YOLOv5RandomAffine',
        max_rotate_degree=0.0,
        max_shear_degree=0.0,
        scaling_ratio_range=(0.5, 1.5),
        border=(-digits_scale[0] // 2, -digits_scale[1] // 2),
        border_val=(114, 114, 114),
    ),
    dict(type='YOLOv5HSVRandomAug'),
    digits_pack,
]

digits_test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='YOLOv5KeepRatioResize', scale=digits_scale),
    dict(type='LetterResize', scale=digits_scale, allow_scale_up=False, pad_val=dict(img=114)),
    dict(type='LoadAnnotations', with_bbox=True, _scope_='mmdet'),
    dict(
        type='mmdet.PackDetInputs',
        meta_keys=(
            'img_id',
            'img_path',
            'ori_shape',
            'img_shape',
            'scale_factor',
            'pad_param',
        ),
    ),
]

# Loaders --------------------------------------------------------------------------------------
# Another place for the set: --cfg-options train_dataloader.dataset.data_root=D/
# val_dataloader.dataset.data_root=D/ val_evaluator.ann_file=D/annotations/val.json
# and the same two with `test`.
digits_train_loader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    pin_memory=False,
    # A base named 'mmyolo::...' puts `_scope_` into every dict with a type, and this function,
    # unlike a class, would be called with it.
    collate_fn=dict(_delete_=True, type='yolov5_collate'),
)
digits_train_set = dict(
    data_root=digits_root,
    metainfo=digits_metainfo,
    ann_file='annotations/train.json',
    data_prefix=dict(img='train/'),
)
digits_val_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    dataset=dict(
        data_root=digits_root,
        metainfo=digits_metainfo,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        batch_shapes_cfg=None,  # all pictures are of one shape
        pipeline=digits_test_pipeline,
    ),
)
digits_evaluator = dict(ann_file=digits_root + 'annotations/val.json')

# Other digits on the other half of the photograph. Runs choose on the validation set (the best
# checkpoint, a horizon, a learning rate), so what they score is reported on this one.
digits_test_dataloader = dict(
    digits_val_dataloader,
    dataset=dict(
        digits_val_dataloader['dataset'],
        ann_file='annotations/test.json',
        data_prefix=dict(img='test/'),
    ),
)
digits_test_evaluator = dict(ann_file=digits_root + 'annotations/test.json')
