"""Contents of checkpoints as each training code writes them, and comparisons of states."""

import argparse
import os

import torch
from torch.optim.swa_utils import AveragedModel
from toys import Toy

KINDS = ('dfine', 'yolov5', 'yolox', 'timm', 'torchvision', 'averaged_model')
WITHOUT_RAW = ('yolox', 'averaged_model')
WITHOUT_STEPS = ('yolox', 'timm')


def same(state, other):
    assert list(state) == list(other)
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def pair(seed=0):
    """Two sets of weights of one model: averaged, raw."""
    torch.manual_seed(seed)
    average, raw = Toy(), Toy()
    return average.state_dict(), raw.state_dict()


def load_state(file):
    return torch.load(file, weights_only=True)['state_dict']


def files_of_others():
    """A file of each code, as its own save function writes it (tests name what they hold)."""
    average, raw = pair()
    args = argparse.Namespace(model='toy', model_ema_decay=0.9998)
    optimizer = torch.optim.SGD(Toy().parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])
    torchs = AveragedModel(Toy(), use_buffers=True)
    torchs.module.load_state_dict(average)
    torchs.n_averaged.fill_(123)
    return {
        'dfine': {
            'date': '2025-01-01',
            'last_epoch': 3,
            'model': raw,
            'ema': {'module': average, 'updates': 123},
            'optimizer': optimizer.state_dict(),
            'lr_scheduler': scheduler.state_dict(),
        },
        'yolov5': {
            'epoch': 3,
            'best_fitness': 0.1,
            'model': raw,
            'ema': average,
            'updates': 123,
            'optimizer': optimizer.state_dict(),
        },
        'yolox': {'start_epoch': 3, 'model': average, 'optimizer': optimizer.state_dict()},
        'timm': {
            'epoch': 3,
            'arch': 'toy',
            'state_dict': raw,
            'optimizer': optimizer.state_dict(),
            'version': 2,
            'args': args,
            'state_dict_ema': average,
        },
        'torchvision': {
            'model': raw,
            'optimizer': optimizer.state_dict(),
            'lr_scheduler': scheduler.state_dict(),
            'epoch': 3,
            'args': args,
            'model_ema': torchs.state_dict(),
        },
        'averaged_model': torchs.state_dict(),
    }


class Hostile:
    """An object whose unpickling makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)
