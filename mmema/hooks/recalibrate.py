"""Hook that measures the BatchNorm statistics of the average instead of averaging them."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Callable, Dict, Iterable, Iterator, NamedTuple

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseAveragedModel
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..arguments import check_integer
from ..messages import RunError
from ..registry import HOOKS, register_everywhere
from ..run import MAIN, averages_of, ema_hook_of, kept_rng, label_of, last_of, validation_follows
from ..swap import copy_weights
from ..update.pairs import canonical_name, copy_all, named_tensors, unwrapped
from ..update.sharded import is_sharded
from .ema import EMAHook


@register_everywhere(HOOKS)
class EMARecalibrateHook(Hook):
    """Measure the BatchNorm statistics of the average before it is validated and saved.

    A running statistic that was copied from the source, or averaged for a long time, belongs to
    other weights than the averaged ones. This hook passes training batches through the average, as
    ``torch.optim.swa_utils.update_bn`` does for models that it can feed: every running mean and
    variance becomes the plain mean of its values over the batches, and over the ranks.

    It runs at the end of a training epoch (or iteration) that a validation follows, so the
    validation, the checkpoint of that epoch and the best one have the new statistics. The model
    itself computes them, with a copy of the averaged weights, as it computes a validation: what a
    hook has set in it counts. Nothing else changes: neither its tensors, gradients and attributes,
    nor training data and random numbers. What its forward writes into a list or dict stays there.
    The next update copies the source's statistics again, or with ``update_buffers=True`` blends
    them into the new ones.

    Args:
        batches: Training batches to measure on, for each rank; fewer if the set has fewer.
            Defaults to 100.
        interval: Measure before every ``interval``-th validation, and before the last. Defaults to
            None: before the last only. A run that EarlyStoppingHook may end needs 1, its last
            validation is not known before.
        mode: The ``mode`` in which the model's ``forward`` is called. Defaults to 'tensor', which
            computes no loss; 'loss' for models that reach some layers only there.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or the run does not allow it.

    Example:
        >>> custom_hooks = [  # in a config
        ...     dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA'),
        ...     dict(type='mmema.EMARecalibrateHook', batches=200),
        ... ]

    Source: ``torch.optim.swa_utils.update_bn``; Izmailov et al., Averaging Weights Leads to Wider
    Optima and Better Generalization, 2018.
    """

    priority = 'LOW'  # after EMAHook has updated or swapped, before CheckpointHook saves

    def __init__(self, batches: int = 100, interval: int | None = None, mode: str = 'tensor'):
        check_integer('batches', batches)
        if interval is not None:
            check_integer('interval', interval)
        if not isinstance(mode, str):
            raise TypeError(f"mode must be a string such as 'tensor' or 'loss', got {mode!r}")
        self.batches = batches
        self.interval = interval
        self.mode = mode
        # Statistics of the source, from a measurement to its validation.
        self._own: list[Tensor] | None = None

    def before_train(self, runner: Runner) -> None:
        """Raise RunError at the start of a run that could not be measured at its end."""
        ema_hook = ema_hook_of(runner)
        if not isinstance(runner.train_loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            raise RunError(
                'EMARecalibrateHook must know when validations are due, as in EpochBasedTrainLoop '
                f'and IterBasedTrainLoop, got a {type(runner.train_loop).__name__}'
            )
        if is_sharded(unwrapped(runner.model)):
            raise RunError(
                'EMARecalibrateHook passes data through the average, but of a sharded model each '
                'rank has the average of its part alone. Leave the hook out, or train with '
                'DDPStrategy.'
            )
        wrapper = runner.optim_wrapper
        # DeepSpeed's has no such method, an OptimWrapperDict one that raises.
        if not hasattr(wrapper, 'optim_context') or hasattr(wrapper, 'optim_wrappers'):
            raise RunError(
                'EMARecalibrateHook computes in the context of an OptimWrapper, but '
                f'{type(wrapper).__name__} has none. Leave the hook out, or train with one '
                'OptimWrapper.'
            )
        if runner.val_loop is None:
            raise RunError(
                'EMARecalibrateHook works before validations, but this run has none. Set '
                'val_dataloader, val_cfg and val_evaluator.'
            )
        place = runner.hooks.index(self)
        for number, hook in enumerate(runner.hooks):
            early = number < place and isinstance(hook, CheckpointHook)
            if early or number > place and hook is ema_hook:
                raise RunError(
                    'EMARecalibrateHook must come after EMAHook and before CheckpointHook, but '
                    f'{type(hook).__name__} comes {"before" if early else "after"} it. Give the '
                    'hooks their own priorities: leave out priority=.'
                )
        if not isinstance(runner._train_dataloader, dict):
            raise RunError(
                'EMARecalibrateHook builds a dataloader of its own, so train_dataloader must be a '
                f'config (a dict), got a {type(runner._train_dataloader).__name__}'
            )
        self._ema_hook = ema_hook
        self._source = unwrapped(runner.model)
        if not any(map(is_measured, self._source.train().modules())):
            raise RunError(
                'the model has no BatchNorm whose running statistics training moves. '
                'Remove EMARecalibrateHook.'
            )
        self._build_loader(runner)  # an error of the dataset shows now

    def after_train_epoch(self, runner: Runner) -> None:
        """Measure, if a validation that is due follows."""
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            self._measure_if_due(runner, runner.epoch + 1)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs: dict | None = None
    ) -> None:
        """Measure, if a validation that is due follows."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            self._measure_if_due(runner, runner.iter + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        """Give the model, which has the averaged weights now, their statistics too."""
        swaps_all = isinstance(self._ema_hook, EMAHook) or self._ema_hook.ema_model.update_buffers
        if self._own is not None and not swaps_all:  # else EMAHook has swapped them already
            copy_all(statistics(self._source), statistics(self._ema_hook.ema_model.module))

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Restore the statistics of the model, before the best checkpoint is saved."""
        if self._own is not None:
            copy_all(statistics(self._source), self._own)
            self._own = None

    def _measure_if_due(self, runner: Runner, now: int) -> None:
        self._own = None  # that of a validation that failed
        loop = runner.train_loop
        if not validation_follows(loop, now):
            return
        due = last = now == last_of(loop)
        if self.interval and not due:
            done = sum(validation_follows(loop, step) for step in range(1, now + 1))
            due = done % self.interval == 0
        if due:
            weights = getattr(runner.val_loop, 'weights', ())  # those that EMAValLoop evaluates
            rungs = getattr(self._ema_hook, 'rungs', {})  # of a ladder; the main one is a rung
            wanted = [*weights, *getattr(self._ema_hook, 'candidates', lambda last: ())(last)]
            wanted += [] if rungs else [MAIN]
            for name, average in averages_of(self._ema_hook).items():
                if name in wanted:
                    label = f'the average {name!r}' if name in rungs else label_of(name)
                    self._measure(runner, average, label)
            self._own = [tensor.clone() for tensor in statistics(self._source)]

    def _measure(self, runner: Runner, average: BaseAveragedModel, label: str) -> None:
        with kept_rng():
            batches = islice(self._build_loader(runner), self.batches)
            context = partial(runner.optim_wrapper.optim_context, self._source)
            measured = measure_statistics(self._source, batches, self.mode, context, average.module)
        measured.copy_to(average.module)
        runner.logger.info(
            f'Measured the statistics of {len(measured.statistics)} BatchNorm layers of '
            f'{label} on {measured.batches} training batches.'
        )
        if measured.others:
            runner.logger.warning(
                f'{measured.others} more keep theirs: no data reached them in '
                f'forward(mode={self.mode!r}), or what came was not finite.'
            )

    def _build_loader(self, runner: Runner):
        # A loader and a copy of the dataset of our own: the training's iterator, its sampler and
        # what transforms such as a cached Mosaic keep in the dataset stay as they are.
        config = dict(runner._train_dataloader)
        config.pop('num_batch_per_epoch', None)  # the dataset of the loop is cut already
        config.update(dataset=runner.train_dataloader.dataset)
        if 'persistent_workers' in config:
            config['persistent_workers'] = False
        with kept_rng():
            return runner.build_dataloader(config, seed=runner.seed)


class Measured(NamedTuple):
    """Statistics by the name of the BatchNorm, and how many layers have none."""

    batches: int
    statistics: Dict[str, Dict[str, Tensor]]
    others: int

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give the layers of a model, or of its average, their statistics."""
        for name, module in model.named_modules():
            for key, value in self.statistics.get(canonical_name(f'{name}.'), {}).items():
                getattr(module, key).copy_(value)


@torch.no_grad()
def measure_statistics(
    model: nn.Module,
    batches: Iterable,
    mode: str = 'tensor',
    context: Callable = nullcontext,
    average: nn.Module | None = None,
) -> Measured:
    """Measure the plain mean of each running mean and variance of BatchNorm over batches.

    The model stays as it is. Layers that no finite data reached on every rank get no statistics.

    Args:
        model: The model that is called, whatever hooks have patched or set in it.
        batches: Batches of a dataloader.
        mode: The ``mode`` of its forward.
        context: A context manager for each call.
        average: The weights that it has meanwhile. Defaults to None, its own.
    """
    with _scratch(model):
        if average is not None:
            copy_weights(model, average)
        norms = {name: norm for name, norm in model.train().named_modules() if is_measured(norm)}
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # torch: the plain mean over all batches
        number = 0
        for batch in batches:
            number += 1
            batch = model.data_preprocessor(batch, True)
            args, kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
            with context():
                model(*args, **kwargs, mode=mode)
        found = {canonical_name(f'{name}.'): _finished(norm) for name, norm in norms.items()}
    measured = {name: new for name, new in found.items() if new}
    return Measured(number, measured, len(found) - len(measured))


@contextmanager
def _scratch(model: nn.Module) -> Iterator[None]:
    """Let a model have copies of its tensors, and give back tensors and attributes at the end."""
    owned = [d for m in model.modules() for d in (vars(m), m._parameters, m._buffers, m._modules)]
    before = [(one, dict(one)) for one in owned]
    tensors = {id(t): (t, t.data) for _, t, _ in named_tensors(model)}
    for tensor, data in tensors.values():
        tensor.data = data.clone()
    try:
        yield
    finally:
        for tensor, data in tensors.values():
            tensor.data = data
        for one, content in before:
            one.clear()
            one.update(content)


def is_measured(module: nn.Module) -> bool:
    """Return whether a layer of a model in training measures statistics; norm_eval keeps some."""
    return isinstance(module, _BatchNorm) and module.training and module.running_mean is not None


def statistics(model: nn.Module) -> list[Tensor]:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    tensors = [t for norm in norms for t in (norm.running_mean, norm.running_var)]
    return [tensor for tensor in tensors if tensor is not None]


def _finished(norm: _BatchNorm) -> Dict[str, Tensor]:
    """Return the statistics of a layer over all ranks; nothing if no finite data reached it."""
    reached = (norm.num_batches_tracked > 0).long()
    all_reduce(reached, op='min')  # a layer that one rank left out is left out by all
    if not int(reached):
        return {}
    found = {key: getattr(norm, key).clone() for key in ('running_mean', 'running_var')}
    for tensor in found.values():
        all_reduce(tensor, op='mean')  # nothing where there is one rank
    return found if all(bool(tensor.isfinite().all()) for tensor in found.values()) else {}
