"""The configs of sharded runs: their groups are in the models, their hooks follow the average."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmema import FullyShardStrategy

CONFIGS = Path(__file__).parents[1] / 'configs'
FILES = [*(CONFIGS / 'sharded').glob('*.py'), CONFIGS / 'digits/yolov5_n_digits_sharded.py']
GROUPS = ['backbone.stage1', 'backbone.stage2', 'backbone.stage3', 'backbone.stage4']


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_groups_and_hooks(file):
    pytest.importorskip('mmyolo')
    config = Config.fromfile(file)
    assert config.runner_type == 'FlexibleRunner'
    assert config.strategy.pop('type') == 'mmema.FullyShardStrategy'
    init_default_scope(config.default_scope)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    strategy = FullyShardStrategy.__new__(FullyShardStrategy)  # no ranks
    strategy.shard = config.strategy.shard
    assert list(strategy._groups_of(model)) == [*GROUPS, 'neck', 'bbox_head']
    kinds = [hook.type.rsplit('.', 1)[-1] for hook in config.custom_hooks]
    assert set(kinds) == {'EMAHook', 'EMARestartHook', 'EMAMonitorHook', 'PipelineSwitchHook'}
    assert config.custom_hooks[0].type == 'mmema.EMAHook'
