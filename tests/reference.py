"""A slow float64 twin of every formula: what the average should be, worked out tensor by tensor."""

import math

import torch


def exp_momentum(steps, momentum, gamma):
    return momentum + (1 - momentum) * math.exp(-(steps + 1) / gamma)


class ReferenceEMA:
    """The average of named tensors in float64, with nothing fast and nothing cached.

    ``blended`` names the tensors that are averaged; all others are copied at every update.
    """

    def __init__(self, tensors, blended, momentum, gamma, interval=1):
        self.average = {name: as_double(tensor) for name, tensor in tensors.items()}
        self.blended = set(blended)
        self.momentum, self.gamma, self.interval = momentum, gamma, interval
        self.steps = 0

    def update(self, tensors):
        for name, tensor in tensors.items():
            if self.steps == 0 or name not in self.blended:
                self.average[name] = as_double(tensor)
            elif self.steps % self.interval == 0:
                m = exp_momentum(self.steps, self.momentum, self.gamma)
                self.average[name] = ((1 - m) * self.average[name]).add_(tensor.detach(), alpha=m)
        self.steps += 1

    def restart(self, steps=0, momentum=None, gamma=None):
        if steps is not None:
            self.steps = steps
        if momentum is not None:
            self.momentum = momentum
        if gamma is not None:
            self.gamma = gamma


def as_double(tensor):
    tensor = tensor.detach().clone()
    return tensor.double() if tensor.is_floating_point() else tensor


def tensors_of(model):
    """All tensors of a model by name, non-persistent buffers too, tied ones under each name."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def blended_names(model, update_buffers):
    """The names that an average of ``model`` blends, frozen or not."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if update_buffers:
        buffers = model.named_buffers(remove_duplicate=False)
        names |= {name for name, buffer in buffers if buffer.is_floating_point()}
    return names


def assert_close(actual, expected, rtol=2e-6, atol=1e-6):
    """Compare named tensors with the reference; integers exactly."""
    assert set(actual) == set(expected)
    for name, tensor in actual.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(
                tensor.double(),
                expected[name],
                rtol=rtol,
                atol=atol,
                msg=lambda m, name=name: f'{name}: {m}',
            )
        else:
            assert torch.equal(tensor, expected[name]), name
