"""The classes that update_cost.py measures: ours, the limit, and those of other libraries.

Each is a function of a model that returns what gives the averaged module, and the update.
"""

from __future__ import annotations

from copy import deepcopy
from importlib import import_module

import torch

import mmema

MOMENTUM = 0.0002
LIMIT = 'limit: one flat lerp_'
OURS = 'mmema'


def with_updates(average):
    return lambda: average.module, average.update_parameters


def mmema_class(model, **kwargs):
    return with_updates(mmema.ExpMomentumEMA(model, MOMENTUM, 1e-3, **kwargs))


def openmmlab(path):
    def make(model):
        module, name = path.rsplit('.', 1)
        cls = getattr(import_module(module), name)
        gamma = {} if name == 'ExponentialMovingAverage' else {'gamma': 1e-3}
        return with_updates(cls(model, momentum=MOMENTUM, update_buffers=True, **gamma))

    return make


def torch_averaged_model(model):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    multi_avg_fn = get_ema_multi_avg_fn(1 - MOMENTUM)
    return with_updates(AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=True))


CONTENDERS = {
    OURS: mmema_class,
    'mmyolo': openmmlab('mmyolo.models.ExpMomentumEMA'),
    'mmdet': openmmlab('mmdet.models.layers.ExpMomentumEMA'),
    'mmengine': openmmlab('mmengine.model.ExponentialMovingAverage'),
    'torch AveragedModel': torch_averaged_model,
}
STAGED, SYNCHRONOUS = "mmema, device='cpu'", 'synchronous copies to main memory'


def synchronous_copies(model):
    """An average in main memory that waits for every tensor."""
    average = deepcopy(model).cpu()

    @torch.no_grad()
    def update(model):
        for own, source in zip(average.parameters(), model.parameters()):
            own.lerp_(source.cpu(), MOMENTUM)
        for own, source in zip(average.buffers(), model.buffers()):
            own.copy_(source)

    return lambda: average, update


ON_GPU = {
    STAGED: lambda model: mmema_class(model, device='cpu'),
    SYNCHRONOUS: synchronous_copies,
}


def limit(model):
    size = sum(tensor.numel() for tensor in floats(model))
    device = next(model.parameters()).device
    average, source = torch.zeros(size, device=device), torch.ones(size, device=device)
    return lambda: average.lerp_(source, MOMENTUM)


def floats(model):
    return [t for t in model.state_dict().values() if t.is_floating_point()]


class Update:
    """An update to be timed; ``settle`` finishes what the one before has left for later."""

    def __init__(self, update, model, module):
        self.update = update
        self.model = model
        self.settle = module

    def __call__(self):
        self.update(self.model)


def checked(model, makes):
    """Return each contender's update, once its second one is seen to follow the formula."""
    updates = {}
    for name, make in makes.items():
        try:
            module, update = make(model)
        except (ImportError, AssertionError):  # mmyolo asserts mmcv's version
            continue
        update(model)  # a first update copies, or finds both equal
        before = [p.detach().clone() for p in list(module().parameters())[:50]]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        update(model)
        for old, new, source in zip(before, module().parameters(), model.parameters()):
            old, new, source = (t.detach().cpu().double() for t in (old, new, source))
            exact = (1 - MOMENTUM) * old + MOMENTUM * source
            torch.testing.assert_close(
                new, exact, rtol=1e-6, atol=2e-7, msg=lambda m, n=name: f'{n} is off: {m}'
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(1)
        updates[name] = Update(update, model, module)
    return updates
