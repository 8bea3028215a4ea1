"""The learning rate of YOLOX, at every iteration."""

import math

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import PARAM_SCHEDULERS
from runs import make_runner

from mmema import YOLOXWarmCosLR
from mmema.lr import yolox_warm_cos


def formula(i, lr, W, N, T, ratio):
    """What Megvii's ``yolox_warm_cos_lr`` gives for the current iteration ``i``."""
    low = lr * ratio
    if i <= W:
        return lr * pow(i / float(W), 2)
    if i >= T - N:
        return low
    return low + 0.5 * (lr - low) * (1.0 + math.cos(math.pi * (i - W) / (T - W - N)))


def rates(epoch_length, **settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    config = dict(by_epoch=True, convert_to_iter_based=True, **settings)
    scheduler = PARAM_SCHEDULERS.build(
        dict(type='mmema.YOLOXWarmCosLR', **config),
        default_args=dict(optimizer=optimizer, epoch_length=epoch_length),
    )
    for _ in range(settings['total'] * epoch_length):
        yield optimizer.param_groups[0]['lr']
        optimizer.step()
        scheduler.step()


def test_every_iteration_is_megviis():
    length, lr = 40, 0.01
    seen = list(rates(length, warm_up=5, plain=15, total=300))
    expected = [formula(i, lr, 200, 600, 12000, 0.05) for i in range(12000)]
    assert seen == pytest.approx(expected, rel=1e-12, abs=0)
    assert seen[0] == 0 and seen[200] == lr and set(seen[11400:]) == {lr * 0.05}


def test_numbers_by_hand():
    # The middle of the cosine: half way between 1 and 0.05.
    assert yolox_warm_cos(60, 1.0, 10, 20, 130, 0.05) == pytest.approx(0.525)
    assert yolox_warm_cos(5, 1.0, 10, 20, 130, 0.05) == 0.25


def test_a_resume_goes_on_where_it_was():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    first = YOLOXWarmCosLR(optimizer, warm_up=3, plain=2, total=20)
    for _ in range(7):
        optimizer.step()
        first.step()
    second = YOLOXWarmCosLR(optimizer, warm_up=3, plain=2, total=20)
    second.load_state_dict(first.state_dict())
    optimizer.step()
    second.step()
    assert optimizer.param_groups[0]['lr'] == formula(8, 0.01, 3, 2, 20, 0.05)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_every_iteration_of_a_real_run(tmp_path, by_epoch):
    class Rates(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            self.seen.append(runner.optim_wrapper.get_lr()['lr'][0])

    unit = 1 if by_epoch else 4
    scheduler = dict(type='mmema.YOLOXWarmCosLR', warm_up=2 * unit, plain=1 * unit, total=6 * unit)
    if by_epoch:
        scheduler.update(by_epoch=True, convert_to_iter_based=True)
    rates = Rates()
    rates.seen = []
    make_runner(tmp_path, rates, param_scheduler=[scheduler]).train()
    assert rates.seen == pytest.approx([formula(i, 0.05, 8, 4, 24, 0.05) for i in range(24)])


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(warm_up=0), 'warm_up must be at least 1'),
        (dict(warm_up=10, plain=10), 'must be below total, got 10 . 10 and 20'),
        (dict(min_lr_ratio=2), r'min_lr_ratio must be in \[0, 1\], got 2'),
        (dict(total=1.5), 'total must be an integer'),
        (dict(by_epoch=True), 'must come with convert_to_iter_based=True'),
    ],
)
def test_bad_arguments(settings, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    with pytest.raises((TypeError, ValueError), match=message):
        YOLOXWarmCosLR(optimizer, **{**dict(warm_up=3, plain=2, total=20), **settings})
