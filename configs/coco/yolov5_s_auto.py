# YOLOv5-s of the stock recipe with a ladder of averages: no horizon is chosen.
_base_ = 'mmyolo::yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py'

train_dataloader = dict(collate_fn=dict(_delete_=True, type='yolov5_collate'))
custom_hooks = [dict(type='mmema.EMAHook', horizon='auto', priority=49)]
