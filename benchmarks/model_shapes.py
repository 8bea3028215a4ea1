#!/usr/bin/env python3
"""Models to measure: tables of the tensors of stock ones, and stand-ins built from these.

    python benchmarks/model_shapes.py    (writes tests/shapes/*.json; needs mmyolo)

An update of an average costs the same for any model with the same modules, tensors and dtypes, so
that it can be tested and timed on machines where mmyolo and mmcv are not installed.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

FOLDER = Path(__file__).resolve().parents[1] / 'tests' / 'shapes'
LARGE = '300 M'
CONFIGS = {  # of mmyolo
    'YOLOv5-n': 'yolov5/yolov5_n-v61_syncbn_fast_8xb16-300e_coco.py',
    'YOLOv5-s': 'yolov5/yolov5_s-v61_syncbn_fast_8xb16-300e_coco.py',
    'YOLOv5-l': 'yolov5/yolov5_l-v61_syncbn_fast_8xb16-300e_coco.py',
}


def real_model(name: str) -> nn.Module:
    """Return a stock model; raise ImportError where mmyolo is not installed."""
    from mmengine.config import Config
    from mmengine.utils import get_installed_path
    from mmyolo.registry import MODELS
    from mmyolo.utils import register_all_modules

    register_all_modules()
    path = f'{get_installed_path("mmyolo")}/.mim/configs/{CONFIGS[name]}'
    return MODELS.build(Config.fromfile(path).model)


def has_mmyolo() -> bool:
    try:
        import mmyolo.models  # noqa: F401
    except (ImportError, AssertionError):  # it asserts mmcv's version
        return False
    return True


def build(name: str, device: str) -> nn.Module:
    """Return a model to measure, in training mode: a stock one, its stand-in, or the large one."""
    if name == LARGE:
        # 24 blocks of a transformer 1024 wide: 12 tensors each.
        layer = nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True)
        return nn.Sequential(*(deepcopy(layer) for _ in range(24))).to(device)
    return (real_model(name) if has_mmyolo() else stand_in(name)).train().to(device)


def table_of(model: nn.Module) -> dict:
    """Return the names of all modules, and (name, kind, dtype, shape) of all tensors."""
    tensors = []
    for path, module in model.named_modules():
        for kind, own in (('parameter', module._parameters), ('buffer', module._buffers)):
            for name, tensor in own.items():
                if tensor is not None:
                    if name in module._non_persistent_buffers_set:
                        kind = 'buffer not saved'
                    dtype = str(tensor.dtype).split('.')[1]
                    full = f'{path}.{name}' if path else name
                    tensors.append([full, kind, dtype, list(tensor.shape)])
    return {'modules': [name for name, _ in model.named_modules() if name], 'tensors': tensors}


def file_of(name: str) -> Path:
    return FOLDER / f'{name.lower().replace("-", "_")}.json'


def stand_in(name: str) -> nn.Module:
    """Return a model with the modules and tensors of a stock one, and without a forward."""
    table = json.loads(file_of(name).read_text())
    modules = {'': nn.Module()}
    for path in table['modules']:
        parent, _, own = path.rpartition('.')
        modules[path] = nn.Module()
        modules[parent].add_module(own, modules[path])
    for path, kind, dtype, shape in table['tensors']:
        parent, _, own = path.rpartition('.')
        tensor = torch.ones(shape, dtype=getattr(torch, dtype))
        if kind == 'parameter':
            modules[parent].register_parameter(own, nn.Parameter(tensor.uniform_(-0.1, 0.1)))
        else:
            modules[parent].register_buffer(own, tensor, persistent=kind == 'buffer')
    return modules['']


def text_of(table: dict) -> str:
    """Return a table as JSON with one line for each tensor."""
    modules = json.dumps(table['modules'])
    lines = ',\n'.join(json.dumps(row) for row in table['tensors'])
    return f'{{"modules": {modules},\n"tensors": [\n{lines}\n]}}\n'


def main():
    FOLDER.mkdir(exist_ok=True)
    for name in CONFIGS:
        file_of(name).write_text(text_of(table_of(real_model(name))))
        print(file_of(name))


if __name__ == '__main__':
    main()
