"""BatchNorm statistics of the average, measured instead of inherited."""

from __future__ import annotations

from contextlib import contextmanager
from typing import List, Optional

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import CheckpointHook, Hook
from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..registry import HOOKS, register_everywhere
from ..run import ema_hook_of, kept_rng, last_of, validation_follows
from ..update.pairs import unwrapped


@register_everywhere(HOOKS)
class EMARecalibrateHook(Hook):
    """Measure the BatchNorm statistics of the average before it is validated and saved.

    A running statistic that was copied from the source, or averaged for a long time, belongs to
    other weights than the averaged ones. This hook passes training batches through the average, as
    ``torch.optim.swa_utils.update_bn`` does for models that it can feed: every running mean and
    variance becomes the plain mean of its values over the batches, and over the ranks.

    It runs at the end of a training epoch (or iteration) that a validation follows, before the
    checkpoint is saved. So the validation, the checkpoint of that epoch and the best one all have
    the new statistics, whether or not the average blends its buffers. Nothing else changes: weights
    and statistics of the source, gradients, other buffers of the average, the order of the training
    data, random numbers. Training goes on from there as it always does: with
    ``update_buffers=False`` the next update copies the statistics of the source again, with True it
    blends the source's into the new ones.

    Args:
        batches: Training batches to measure on, for each rank; fewer if the set has fewer.
            Defaults to 100.
        interval: Measure before every ``interval``-th validation, and before the last. Defaults to
            None: before the last only. A run that EarlyStoppingHook may end needs 1, its last
            validation is not known before.
        mode: The ``mode`` in which the model's ``forward`` is called. Defaults to 'tensor', which
            computes no loss; 'loss' for models that reach some layers only there.

    Raises:
        TypeError: If ``mode`` is no string.
        ValueError: If an argument is out of range, or this run does not allow it: no EMAHook, no
            validation, no BatchNorm with running statistics, hooks in another order, an average on
            another device, or a train_dataloader that is not a config.

    Example:
        >>> custom_hooks = [  # in a config
        ...     dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA'),
        ...     dict(type='mmema.EMARecalibrateHook', batches=200),
        ... ]

    Source: ``torch.optim.swa_utils.update_bn``; Izmailov et al., Averaging Weights Leads to Wider
    Optima and Better Generalization, 2018.
    """

    priority = 'LOW'  # after EMAHook has updated or swapped, before CheckpointHook saves

    def __init__(self, batches: int = 100, interval: Optional[int] = None, mode: str = 'tensor'):
        for name, value in (('batches', batches), ('interval', interval)):
            if name == 'interval' and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{name} must be a positive integer, got {value!r}')
        if not isinstance(mode, str):
            raise TypeError(f"mode must be a string such as 'tensor' or 'loss', got {mode!r}")
        self.batches = batches
        self.interval = interval
        self.mode = mode
        self._of_source: Optional[List[Tensor]] = None
        self._of_average: Optional[List[Tensor]] = None

    def before_train(self, runner) -> None:
        """Refuse at the start what could not be right at the end."""
        ema_hook = ema_hook_of(runner)
        if not isinstance(runner.train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            raise ValueError(
                'EMARecalibrateHook must know when validations are due, as in EpochBasedTrainLoop '
                f'and IterBasedTrainLoop, got a {type(runner.train_loop).__name__}'
            )
        if runner.val_loop is None:
            raise ValueError(
                'EMARecalibrateHook works before validations, but this run has none. Set '
                'val_dataloader, val_cfg and val_evaluator.'
            )
        _refuse_order(runner, self)
        if not isinstance(runner._train_dataloader, dict):
            raise ValueError(
                'EMARecalibrateHook builds a dataloader of its own, so train_dataloader must be a '
                f'config (a dict), got a {type(runner._train_dataloader).__name__}'
            )
        self._average = ema_hook.ema_model.module
        self._source = unwrapped(runner.model)
        if not measurable(self._average):
            raise ValueError(
                'the model has no BatchNorm whose running statistics training moves. '
                'Remove EMARecalibrateHook.'
            )
        places = [{p.device for p in m.parameters()} for m in (self._average, self._source)]
        if places[0] != places[1]:
            raise ValueError(
                f'the average must be on the device of the model to be measured there, but is on '
                f'{places[0]} and the model on {places[1]}. Leave out device= of EMAHook.'
            )
        self._make_loader(runner)  # what fails should fail now

    def after_train_epoch(self, runner) -> None:
        """Measure, if a validation follows that is to have it."""
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._measure_if_due(runner, runner.epoch + 1)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Measure, if a validation follows that is to have it."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            self._measure_if_due(runner, runner.iter + 1)

    def before_val_epoch(self, runner) -> None:
        """Let the model, which has the averaged weights now, have their statistics too."""
        if self._of_average is not None:
            _copy(statistics(self._source), self._of_average)

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Give the model its own statistics back, before the best checkpoint is saved."""
        if self._of_average is None:
            return
        _copy(statistics(self._source), self._of_source)
        _copy(statistics(self._average), self._of_average)
        self._of_source = self._of_average = None

    def _measure_if_due(self, runner, now: int) -> None:
        # Kept from an earlier validation only if there was an exception in it.
        self._of_source = self._of_average = None
        if not self._is_due(runner.train_loop, now):
            return
        self.recalibrate(runner)
        self._of_source = _clones(statistics(self._source))
        self._of_average = _clones(statistics(self._average))

    def _is_due(self, loop, now: int) -> bool:
        if not validation_follows(loop, now):
            return False
        if now == last_of(loop):
            return True
        if self.interval is None:
            return False
        done = sum(validation_follows(loop, step) for step in range(1, now + 1))
        return done % self.interval == 0

    def recalibrate(self, runner) -> None:
        """Measure the statistics of the average now."""
        norms = measurable(self._average)
        momenta = [norm.momentum for norm in norms]
        before = [(buffer, buffer.clone()) for buffer in self._average.buffers()]
        measured: List[nn.Module] = []
        try:
            with kept_rng(), torch.no_grad(), _in_train_mode(self._average):
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # torch: the plain mean over all batches
                number = self._forward_batches(runner)
                measured = [norm for norm in norms if _finish(norm)]
        finally:
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
            new = {id(t) for norm in measured for t in (norm.running_mean, norm.running_var)}
            for buffer, value in before:
                if id(buffer) not in new:
                    buffer.copy_(value)
        runner.logger.info(
            f'Measured the statistics of {len(measured)} BatchNorm layers of the average on '
            f'{number} training batches.'
        )
        if len(measured) < len(norms):
            runner.logger.warning(
                f'{len(norms) - len(measured)} more keep theirs: no data reached them in '
                f'forward(mode={self.mode!r}), or what came was not finite.'
            )

    def _forward_batches(self, runner) -> int:
        number = 0
        for number, batch in zip(range(1, self.batches + 1), self._make_loader(runner)):  # noqa: B007
            batch = self._average.data_preprocessor(batch, True)
            with runner.optim_wrapper.optim_context(self._average):
                if isinstance(batch, dict):
                    self._average(**batch, mode=self.mode)
                else:
                    self._average(*batch, mode=self.mode)
        return number

    def _make_loader(self, runner):
        # A loader and a copy of the dataset of our own: the training's iterator, its sampler and
        # what transforms such as a cached Mosaic keep in the dataset stay as they are.
        config = dict(runner._train_dataloader)
        config.pop('num_batch_per_epoch', None)  # the dataset of the loop is cut already
        config.update(dataset=runner.train_dataloader.dataset)
        if 'persistent_workers' in config:
            config['persistent_workers'] = False
        with kept_rng():
            return runner.build_dataloader(config, seed=runner.seed)


def batch_norms(model: nn.Module) -> List[_BatchNorm]:
    """Return the BatchNorm layers that have running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


def statistics(model: nn.Module) -> List[Tensor]:
    """Return all running means and variances, in the order of the layers."""
    return [t for norm in batch_norms(model) for t in (norm.running_mean, norm.running_var)]


def measurable(model: nn.Module) -> List[_BatchNorm]:
    """Return those that training measures; a backbone with norm_eval keeps the others fixed."""
    with _in_train_mode(model):
        return [norm for norm in batch_norms(model) if norm.training]


@contextmanager
def _in_train_mode(model: nn.Module):
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _finish(norm: _BatchNorm) -> bool:
    """Average over the ranks; tell whether there is a result."""
    reached = (norm.num_batches_tracked > 0).long()
    all_reduce(reached, op='min')  # a layer that one rank left out is left out by all
    if not int(reached):
        return False
    tensors = (norm.running_mean, norm.running_var)
    for tensor in tensors:
        all_reduce(tensor, op='mean')  # nothing where there is one rank
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _copy(targets: List[Tensor], values: List[Tensor]) -> None:
    for target, value in zip(targets, values):
        target.copy_(value)


def _clones(tensors: List[Tensor]) -> List[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _refuse_order(runner, own: EMARecalibrateHook) -> None:
    """The order in which hooks are called decides whose statistics are where."""
    hooks = runner.hooks
    for position, hook in enumerate(hooks):
        name, late = type(hook).__name__, position > hooks.index(own)
        if (isinstance(hook, StockEMAHook) and late) or (
            isinstance(hook, CheckpointHook) and not late
        ):
            raise ValueError(
                f'EMARecalibrateHook must come after EMAHook and before CheckpointHook, but '
                f'{name} comes {"after" if late else "before"} it. Give the hooks their own '
                'priorities: leave out priority=.'
            )
