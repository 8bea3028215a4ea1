"""Real models from MMYOLO's and MMDetection's shipped configs, built without downloads."""

from pathlib import Path

import pytest


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
