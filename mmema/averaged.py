"""The averaged models: what is averaged, the update, the restart and the state."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import Optional, Sequence, Union

import torch
from mmengine.model import BaseAveragedModel
from torch import Tensor, nn

from . import schedules
from .arguments import check_momentum, check_positive, count, flag
from .messages import listed, warn
from .registry import MODELS, register_everywhere
from .swap import refuse_while_swapped
from .update.direct import Pairing
from .update.finite import Guard, is_number
from .update.pairs import Pair, averaged_copy, canonical_name, named_tensors, pairs_of, unwrapped
from .update.staging import Mirror, is_far

Device = Union[torch.device, str, None]


class MomentumAveragedModel(BaseAveragedModel):
    """Base of mmema's averages: everything but the schedule.

    At every update ``avg <- (1 - m) avg + m src``, with ``m`` from :meth:`momentum_at`; the first
    update, and the first after a hard restart, copies.

    - Parameters are blended, once each: two names for one tensor are one tensor.
    - Buffers are copied at every update, non-persistent ones too; with ``update_buffers`` those of
      a floating-point dtype are blended instead.
    - Frozen parameters (``requires_grad=False`` in the source) are copied, as long as they are.
    - Sixteen-bit parameters have a float32 average.
    - The tensors of the source are found by name in the ``model`` that the update is given, and
      found again as soon as anything in it was re-assigned, converted or replaced.
    - With an average in main memory and a source on a GPU, an update only sends the weights on
      their way; they are taken in at the next update or as soon as anything of the average is
      read. Neither the program nor what is read notices, but for a module that was taken out of
      ``module`` before.

    Args:
        model: The model to average. It is deep-copied; wrappers such as
            MMDistributedDataParallel are taken off.
        interval: Parameters are blended at every ``interval``-th update. Defaults to 1.
        device: Where the average is kept. Defaults to None, the device of each tensor.
        update_buffers: Whether float buffers are blended rather than copied. Defaults to False.
        exclude: Names of tensors that are copied rather than blended, or patterns with ``*``, ``?``
            and ``[...]``; ``*`` matches dots, too: ``'backbone.*'``. Defaults to none.
        skip_non_finite: Whether a source tensor with a NaN or an infinity is left out of that
            update; the log names it once and ``skipped`` counts it. Defaults to False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, a pattern matches nothing, or the model cannot
            be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        interval: int = 1,
        device: Device = None,
        update_buffers: bool = False,
        exclude: Sequence[str] = (),
        skip_non_finite: bool = False,
    ) -> None:
        # Not BaseAveragedModel's own: it would keep references to tensors that may be replaced.
        nn.Module.__init__(self)
        if not isinstance(model, nn.Module):
            raise TypeError(f'model must be a torch.nn.Module, got {type(model).__name__}')
        self.interval = count('interval', interval)
        self.update_buffers = flag('update_buffers', update_buffers)
        self.skip_non_finite = flag('skip_non_finite', skip_non_finite)
        self.exclude = patterns(exclude, unwrapped(model))
        self.module = averaged_copy(unwrapped(model), as_device(device))
        # On the CPU wherever the weights are: it is read at every update, and reading it from an
        # accelerator would wait for all that the device has to do.
        self.register_buffer('steps', torch.tensor(0, device='cpu'))
        self._pairing: Optional[Pairing] = None
        self._mirror: Optional[Mirror] = None
        self._late: list = []  # the momentum of the update that is on its way, if one is
        self._guard: Optional[Guard] = None
        self._skipped_before: dict = {}
        self._told_skipped: set = set()

    def momentum_at(self, steps: int) -> float:
        """Return the momentum of the update that finds the counter at ``steps`` > 0."""
        raise NotImplementedError

    @property
    def current_momentum(self) -> float:
        """The momentum that the next blend will use; 1.0 where the next update copies."""
        steps = int(self.steps)
        due = math.ceil(steps / self.interval) * self.interval
        return self.momentum_at(due) if steps else 1.0

    @property
    def avg_parameters(self) -> dict:
        """The averaged tensors by name, as BaseAveragedModel has them."""
        if self.update_buffers:
            return self.module.state_dict()
        return dict(self.module.named_parameters())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take the weights that ``model`` has now into the average.

        Args:
            model: The source; the same layers as the model that the average was made of.

        Raises:
            ValueError: If its tensors have other names or shapes than the average's.
            RuntimeError: If the model holds the averaged weights now.
        """
        refuse_while_swapped(self, 'update them')
        self._catch_up()
        mirror = self._mirror_of(model)
        momentum = self._momentum_due()
        if mirror is None:
            self._take(self._pairing, momentum)
        else:
            mirror.fetch(blended=momentum is not None)
            self._late.append(momentum)
        self.steps.add_(1)

    def _momentum_due(self) -> Optional[float]:
        """Return the momentum of this update: 1 if it copies, None if it does not blend."""
        steps = int(self.steps)
        if steps == 0:
            return 1.0
        return self.momentum_at(steps) if steps % self.interval == 0 else None

    def _take(self, pairing: Pairing, momentum: Optional[float]) -> None:
        if self.skip_non_finite and not self._guard_of(pairing).sees_only_finite():
            self._guard.update(momentum)
            if self._guard.on_cpu:
                self.log_skipped()
            return
        if momentum == 1:
            pairing.copy_blended()
        elif momentum is not None:
            pairing.blend(momentum)
        pairing.copy()

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Take in what is on its way."""
        if not self.__dict__.get('_late'):
            return
        mirror = self._mirror
        mirror.wait()  # where Ctrl-C arrives: nothing has changed yet
        momentum = self._late.pop()
        if not self._pairing.holds(self.module, mirror.module):  # the average was moved, say
            self._mirror = None
            self._pairing = self._paired_with(mirror.module)
        self._take(self._pairing, momentum)

    @property
    def skipped(self) -> dict:
        """How often each tensor was left out because it was not finite."""
        self._catch_up()
        counts = dict(self._skipped_before)
        for name, number in (self._guard.counts() if self._guard else {}).items():
            counts[name] = counts.get(name, 0) + number
        return counts

    def log_skipped(self) -> None:
        """Log the names of tensors that were left out, each once."""
        new = [name for name in self.skipped if name not in self._told_skipped]
        if new:
            self._told_skipped.update(new)
            warn(
                f'not finite in the model, so left out of the average: {listed(new)}. The average '
                'goes on from the next update in which they are finite.'
            )

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give ``model`` the averaged weights."""
        for pair, _ in pairs_of(self.module, unwrapped(model)):
            pair.source.copy_(pair.average)

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Blend one tensor: the plain form of what an update does to all of them at once."""
        averaged_param.lerp_(source_param, self.momentum_at(int(steps)))

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load a state of this class or of an EMA class of MMEngine, MMDetection or MMYOLO.

        Args:
            state_dict: ``steps`` and the averaged tensors under ``module.``.
            strict: Whether keys that the average does not know are an error, too.
            assign: As in torch.

        Raises:
            RuntimeError: If ``steps`` or an averaged tensor is missing, strict or not: the next
                update would replace the average, or blend random weights, and nothing would show
                it. Also if a shape differs.
        """
        missing = sorted(set(state_keys(self)) - set(state_dict))
        if missing:
            more = f' and {len(missing) - 5} more' if len(missing) > 5 else ''
            raise RuntimeError(
                f'an EMA state must hold `steps` and every averaged tensor, but {missing[:5]}{more}'
                ' are missing. Resume from a whole checkpoint, or start from its weights alone '
                'with `load_from`.'
            )
        kwargs = {'assign': True} if assign else {}  # torch 2.0 does not know the argument
        return super().load_state_dict(state_dict, strict=strict, **kwargs)

    def _mirror_of(self, model: nn.Module) -> Optional[Mirror]:
        """Return the mirror of a far source, or None and have ``_pairing`` hold for a near one."""
        if not self._follows(model):
            self._mirror = self._pairing = None  # frees the memory of the old ones first
            source = unwrapped(model)
            if is_far(self.module, source):
                self._mirror = Mirror(source, self._blends_in(source))
            self._pairing = self._paired_with(self._mirror.module if self._mirror else source)
        return self._mirror

    def _follows(self, model: nn.Module) -> bool:
        if self._pairing is None:
            return False
        known = self._mirror or self._pairing
        source = model if model is known.source else unwrapped(model)
        if self._mirror:
            return self._mirror.holds(source)
        return self._pairing.holds(self.module, source)

    def _paired_with(self, source: nn.Module) -> Pairing:
        return Pairing(self.module, source, self._blends_in(source))

    def _blends_in(self, source: nn.Module):
        """Return what tells from a pair, and whether it is a buffer, if it is blended."""
        excluded = {
            id(tensor)  # under whichever of its names
            for name, tensor, _ in named_tensors(source)
            if any(fnmatchcase(canonical_name(name), pattern) for pattern in self.exclude)
        }

        def is_blended(pair: Pair, is_buffer: bool) -> bool:
            kind = self.update_buffers if is_buffer else pair.source.requires_grad
            return is_number(pair.source) and kind and id(pair.source) not in excluded

        return is_blended

    def _guard_of(self, pairing: Pairing) -> Guard:
        if self._guard is None or self._guard.pairing is not pairing:
            self._skipped_before = self.skipped
            self._guard = Guard(pairing)
        return self._guard

    # Whatever leads to a tensor of the average catches up first.

    def __getattr__(self, name):
        if name == 'module':
            self._catch_up()
        return super().__getattr__(name)

    def named_modules(self, *args, **kwargs):
        self._catch_up()
        return super().named_modules(*args, **kwargs)

    def named_children(self):
        self._catch_up()
        return super().named_children()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        self._catch_up()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._catch_up()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.steps = self.steps.cpu()  # with assign=True it is the tensor of the state

    def _apply(self, fn, *args, **kwargs):
        steps = self.steps
        super()._apply(fn, *args, **kwargs)
        self.steps = steps
        return self

    def __getstate__(self):
        # The pairing holds the source; a copy or a pickle of the average must not take it along.
        self._catch_up()
        return {
            **self.__dict__,
            '_pairing': None,
            '_mirror': None,
            '_late': [],
            '_guard': None,
            '_skipped_before': self.skipped,
            '_told_skipped': set(self._told_skipped),
        }


@MODELS.register_module()
class ExpMomentumEMA(MomentumAveragedModel):
    """Exponential moving average with a momentum that falls exponentially, as YOLO uses it.

    ``momentum(steps) = (1 - momentum) * exp(-(1 + steps) / gamma) + momentum``

    Takes the config of MMDetection's and MMYOLO's class of this name and gives, bit for bit in
    float32, MMYOLO's weights. What is averaged: see :class:`MomentumAveragedModel`.

    Args:
        model: The model to average.
        momentum: Weight of the new value after the warm-up, in (0, 1). Defaults to 0.0002.
        gamma: Time constant of the warm-up in updates, above 0. Defaults to 2000.
        interval: Parameters are blended at every ``interval``-th update. Defaults to 1.
        device: Where the average is kept. Defaults to None, the device of each tensor.
        update_buffers: Whether float buffers are blended rather than copied. Defaults to False.
        exclude: Names of tensors that are copied rather than blended, or patterns with ``*``, ``?``
            and ``[...]``; ``*`` matches dots, too: ``'backbone.*'``. Defaults to none.
        skip_non_finite: Whether a source tensor with a NaN or an infinity is left out of that
            update; the log names it once and ``skipped`` counts it. Defaults to False.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, a pattern matches nothing, or the model cannot
            be copied.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = ExpMomentumEMA(model, momentum=0.1, gamma=10)
        >>> ema.update_parameters(model)  # the first update copies
        >>> round(ema.current_momentum, 4)  # 0.9 * exp(-2 / 10) + 0.1
        0.8369

    Source: ``ModelEMA`` of YOLOv5; ``ExpMomentumEMA`` of MMDetection.
    """

    def __init__(
        self,
        model: nn.Module,
        momentum: float = 0.0002,
        gamma: float = 2000,
        interval: int = 1,
        device: Device = None,
        update_buffers: bool = False,
        exclude: Sequence[str] = (),
        skip_non_finite: bool = False,
    ) -> None:
        self.check_hyperparameters(momentum=momentum, gamma=gamma)
        super().__init__(model, interval, device, update_buffers, exclude, skip_non_finite)
        self.momentum = momentum
        self.gamma = gamma
        warn_of_large(momentum)

    @staticmethod
    def check_hyperparameters(
        momentum: Optional[float] = None, gamma: Optional[float] = None
    ) -> None:
        """Raise TypeError or ValueError if a given value breaks its rule."""
        check_momentum(momentum)
        check_positive('gamma', gamma)

    def momentum_at(self, steps: int) -> float:
        return schedules.exp_momentum(steps, self.momentum, self.gamma)


class Restartable(MomentumAveragedModel):
    """Base of averages whose schedule can be restarted while training goes on.

    A subclass names its hyperparameters in ``_LIVE``, checks them in ``check_hyperparameters`` and
    lists them in its own ``restart``. They are live: assigning one changes the next update.

    A live value that a restart or an assignment had set comes back with a state that is loaded. One
    that came from the constructor does not: the value that the config has now wins over the one it
    had then. A warning names both.
    """

    _LIVE = ()

    restarts = 0

    def __setattr__(self, name, value):
        if name in self._LIVE:
            self.check_hyperparameters(**{name: value})
            if name in self.__dict__:  # else it is the constructor that sets it
                self._changed.add(name)
        super().__setattr__(name, value)

    @property
    def _changed(self) -> set:
        """Which live values are no longer the constructor's."""
        return self.__dict__.setdefault('_changed_names', set())

    def _restart(self, steps: Optional[int], **live) -> None:
        new = {name: value for name, value in live.items() if value is not None}
        if steps is None and not new:
            raise ValueError(
                f'restart(steps=None) must change one of {", ".join(live)}, got None for all'
            )
        if steps is not None:
            count('steps', steps, least=0)
        self.check_hyperparameters(**new)
        if steps is not None:
            self.steps.fill_(steps)
        for name, value in new.items():
            setattr(self, name, value)
        self.restarts += 1

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._LIVE:
            destination[prefix + name] = torch.tensor(getattr(self, name), dtype=torch.float64)
        destination[prefix + 'changed'] = torch.tensor([n in self._changed for n in self._LIVE])
        destination[prefix + 'restarts'] = torch.tensor(self.restarts)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, *args
    ):
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, *args
        )
        live = {name: state_dict.get(prefix + name) for name in self._live_keys}
        unexpected[:] = [key for key in unexpected if key not in {prefix + name for name in live}]
        if any(value is None for value in live.values()):
            warn(
                f'{type(self).__name__} took over an average after {int(self.steps)} updates from '
                f'a state of another class; {" and ".join(self._LIVE)} are those of the config.'
            )
        else:
            self._load_live(live)

    @property
    def _live_keys(self) -> tuple:
        return (*self._LIVE, 'changed', 'restarts')

    def rewind(self, state_dict) -> None:
        """Take the average and the counter from a state; live values and restarts stay."""
        own = self.state_dict()
        kept = {key: own[key] for key in self._live_keys}
        taken = {key: state_dict[key] for key in state_keys(self) if key in state_dict}
        super().load_state_dict({**kept, **taken})

    def _load_live(self, live: dict) -> None:
        self.restarts = int(live['restarts'])
        for name, was_changed in zip(self._LIVE, live['changed'].tolist()):
            saved, configured = live[name].item(), getattr(self, name)
            if was_changed:
                setattr(self, name, saved)
            if saved != configured:
                used, other = ('state', 'config') if was_changed else ('config', 'state')
                warn(
                    f'{name}: {getattr(self, name):g} from the {used} is used, the {other} has '
                    f'{configured if was_changed else saved:g}.'
                )


@register_everywhere(MODELS)
class RestartableExpMomentumEMA(Restartable, ExpMomentumEMA):
    """:class:`ExpMomentumEMA` whose schedule can be restarted while training goes on.

    ``momentum`` and ``gamma`` are live: assigning them changes the next update. The state holds
    them, and the number of ``restarts``, beside the average. Arguments and errors: those of
    :class:`ExpMomentumEMA`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = RestartableExpMomentumEMA(model, momentum=0.1, gamma=10)
        >>> for _ in range(1000):
        ...     ema.update_parameters(model)
        >>> round(ema.current_momentum, 4)
        0.1
        >>> ema.restart(steps=5, momentum=0.05)  # soft: part of the average is kept
        >>> round(ema.current_momentum, 4)  # 0.95 * exp(-6 / 10) + 0.05
        0.5714
    """

    _LIVE = ('momentum', 'gamma')

    def restart(
        self,
        steps: Optional[int] = 0,
        momentum: Optional[float] = None,
        gamma: Optional[float] = None,
    ) -> None:
        """Restart the schedule; everything is checked before anything changes.

        Args:
            steps: 0, a hard restart: the next update copies the source, then the schedule warms up
                again. Above 0, a soft one: the counter goes there, and part of the average is
                kept. None: the counter goes on, only momentum or gamma change. Defaults to 0.
            momentum: New momentum, in (0, 1). Defaults to None, as it is.
            gamma: New gamma in updates, above 0. Defaults to None, as it is.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If one is out of range, or all are None.
        """
        self._restart(steps, momentum=momentum, gamma=gamma)


def patterns(exclude: Sequence[str], model: nn.Module) -> tuple:
    """Return the patterns of ``exclude``; raise an error if one matches no tensor of the model."""
    if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in exclude):
        raise TypeError(f'exclude must be a list of strings, got {exclude!r}')
    names = [canonical_name(name) for name, _, _ in named_tensors(model)]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f'each pattern of exclude must match a tensor, but {pattern!r} matches none, such '
                f'as {names[0]!r}. For all of a module write {pattern + ".*"!r}.'
            )
    return tuple(exclude)


def state_keys(ema: BaseAveragedModel) -> list[str]:
    """Return the keys that every EMA state has, MMEngine's included."""
    return ['steps', *(f'module.{key}' for key in ema.module.state_dict())]


def as_device(device: Device) -> Optional[torch.device]:
    """Return a torch.device with its index, or None."""
    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f'device must be a string or a torch.device, got {device!r}')
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device must name a torch device, got {device!r} ({error})') from None
    return torch.empty(0, device=device).device  # 'cuda' is 'cuda:0'


def warn_of_large(momentum: float) -> None:
    """Warn of what is probably a decay."""
    if momentum > 0.5:
        warn(
            f'momentum is {momentum:g}, the weight of the new value. Did you mean 1 - {momentum:g} '
            f'= {1 - momentum:.6g}?'
        )
