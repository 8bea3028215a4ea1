"""Small models with every kind of tensor that an average has to treat rightly."""

from copy import deepcopy

import torch
from reference import tensors_of
from torch import nn


class Toy(nn.Module):
    """Parameters, a tied one, float, integer and non-persistent buffers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.tied = nn.Conv2d(2, 3, 1)
        self.tied.weight = self.conv.weight
        self.register_buffer('anchors', torch.rand(2, 2))
        self.register_buffer('calls', torch.tensor(0))
        self.register_buffer('cache', torch.rand(3), persistent=False)

    def forward(self, x):
        return self.norm(self.conv(x) + self.tied(x))


@torch.no_grad()
def shake(model, generator):
    """Change every tensor of a model, as training steps do."""
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(torch.rand(buffer.shape, generator=generator))
        else:
            buffer.add_(1)


@torch.no_grad()
def shake_on_cpu(model, generator):
    """The same change, by the same random numbers, wherever the model is."""
    shaken = deepcopy(model).cpu()
    shake(shaken, generator)
    for mine, new in zip(tensors_of(model).values(), tensors_of(shaken).values()):
        mine.copy_(new)


def seeded(seed):
    return torch.Generator().manual_seed(seed)
