"""The learning rate of YOLOX, whose no-augmentation stage the average is restarted at."""

from __future__ import annotations

import math

from mmengine.optim.scheduler.lr_scheduler import LRSchedulerMixin
from mmengine.optim.scheduler.param_scheduler import INF, _ParamScheduler

from .arguments import count, real
from .registry import PARAM_SCHEDULERS, register_everywhere


def yolox_warm_cos(
    i: int, lr: float, warm_up: int, plain: int, total: int, min_lr_ratio: float
) -> float:
    """Learning rate of iteration ``i``: quadratic warm-up, cosine, constant end.

    - ``lr (i / W)^2`` for ``i <= W``,
    - ``min_lr`` for ``i >= T - N``, with ``min_lr = min_lr_ratio * lr``,
    - else ``min_lr + (lr - min_lr) (1 + cos(pi (i - W) / (T - W - N))) / 2``

    Args:
        i: Iteration, from 0.
        lr: Its peak.
        warm_up: W, iterations of the warm-up.
        plain: N, iterations of the last stage, without augmentation.
        total: T, iterations of the run.
        min_lr_ratio: What is left of the peak in the last stage.

    Returns:
        The learning rate.

    Example:
        >>> [yolox_warm_cos(i, 1.0, 10, 20, 130, 0.05) for i in (0, 5, 10, 110)]
        [0.0, 0.25, 1.0, 0.05]
        >>> round(yolox_warm_cos(60, 1.0, 10, 20, 130, 0.05), 6)
        0.525

    Source: ``yolox_warm_cos_lr`` of Megvii's YOLOX.
    """
    low = min_lr_ratio * lr
    if i <= warm_up:
        return lr * (i / warm_up) ** 2
    if i >= total - plain:
        return low
    angle = math.pi * (i - warm_up) / (total - warm_up - plain)
    return low + (lr - low) * (1 + math.cos(angle)) / 2


@register_everywhere(PARAM_SCHEDULERS)
class YOLOXWarmCosLR(LRSchedulerMixin, _ParamScheduler):
    """Set the learning rate to :func:`yolox_warm_cos` at every iteration.

    MMYOLO's YOLOX config chains three schedulers instead, whose cosine is five epochs too long and
    whose warm-up is one iteration early. The curve is computed afresh from the iteration, so it is
    the same after a resume.

    Args:
        optimizer: The optimizer or its wrapper.
        warm_up: Epochs of the warm-up (iterations with ``by_epoch=False``).
        plain: Epochs of the last stage.
        total: Epochs of the run.
        min_lr_ratio: What is left of the peak in the last stage. Defaults to 0.05.
        by_epoch: Give it as True with ``convert_to_iter_based=True``, so that the three above are
            converted. Defaults to False.
        last_step: For a resume. Defaults to -1.
        end: The end of the run, which Runner passes to every scheduler; ``total`` says it here.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or nothing is left for the cosine.

    Example:
        >>> param_scheduler = dict(
        ...     type='mmema.YOLOXWarmCosLR',
        ...     warm_up=5, plain=15, total=300, by_epoch=True, convert_to_iter_based=True,
        ... )
    """

    def __init__(
        self,
        optimizer,
        warm_up: int,
        plain: int,
        total: int,
        min_lr_ratio: float = 0.05,
        by_epoch: bool = False,
        last_step: int = -1,
        end: int | None = None,
    ):
        self.warm_up = count('warm_up', warm_up)
        self.plain = count('plain', plain, least=0)
        self.total = count('total', total)
        if warm_up + plain >= total:
            raise ValueError(
                f'warm_up + plain must be below total, got {warm_up} + {plain} and {total}'
            )
        if not 0 <= real('min_lr_ratio', min_lr_ratio) <= 1:
            raise ValueError(f'min_lr_ratio must be in [0, 1], got {min_lr_ratio}')
        self.min_lr_ratio = min_lr_ratio
        if by_epoch:
            raise ValueError(
                'by_epoch=True must come with convert_to_iter_based=True: the rate changes at '
                'every iteration'
            )
        super().__init__(optimizer, begin=0, end=INF, last_step=last_step, by_epoch=False)

    @classmethod
    def build_iter_from_epoch(cls, *args, warm_up, plain, total, epoch_length, end=None, **kwargs):
        """Build it from a config by epochs."""
        kwargs['by_epoch'] = False
        return cls(
            *args,
            warm_up=warm_up * epoch_length,
            plain=plain * epoch_length,
            total=total * epoch_length,
            **kwargs,
        )

    def _get_value(self):
        return [
            yolox_warm_cos(
                self.last_step, base, self.warm_up, self.plain, self.total, self.min_lr_ratio
            )
            for base in self.base_values
        ]
