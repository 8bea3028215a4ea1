"""The averaged models: their tensors, the update, the state, and the average of YOLO."""

from __future__ import annotations

import math
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import wraps
from typing import Callable, Iterable, Sequence, Union

import torch
from mmengine.model import BaseAveragedModel
from torch import Tensor, nn

from .arguments import check_bool, check_integer, check_strings
from .messages import listed, warn
from .record import Record, blends_by_rule
from .registry import MODELS
from .schedules import ExpSchedule, Schedule
from .swap import finish_copies, note_owed, refuse_while_swapped
from .update.follower import follow
from .update.guard import SkipCounts
from .update.model_copy import averaged_copy
from .update.pairs import canonical_name, named_tensors, pairs_of, remake_buffers, unwrapped
from .update.refusals import refuse_pieces
from .update.selection import Selection
from .update.sharded import followed

EXTRA_STATE = '_extra_state'  # end of torch's key for what a layer keeps beside its tensors

Device = Union[torch.device, str, None]


class LiveValue:
    """A field of the schedule as an attribute of the average: assigning it changes the schedule."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, average, owner=None):
        return self if average is None else getattr(average.schedule, self.name)

    def __set__(self, average, value) -> None:
        average._set_live(**{self.name: value})


def _without_arguments_of_hook(init: Callable) -> Callable:
    """Return a constructor that says which hook has the arguments that MMEngine's hands on."""

    @wraps(init)
    def checked(self, *args, **kwargs):
        wrong = [name for name in ('horizon', 'also', 'evaluate') if name in kwargs]
        if wrong:
            raise TypeError(
                f'{wrong[0]} is an argument of mmema.EMAHook, got it in an averaged model. Set '
                f"type='mmema.EMAHook' in place of type='EMAHook'."
            )
        init(self, *args, **kwargs)

    return checked


class MomentumAveragedModel(BaseAveragedModel):
    """Base of mmema's averages; a subclass makes the schedule, whose fields it takes as arguments.

    At every update ``avg <- (1 - m) avg + m src``, with ``m`` from the schedule; the first update,
    and the first after a hard restart, copies.

    - Parameters are blended, once each, frozen or not: two names for one tensor are one tensor. A
      constant one stays as it is, bit for bit.
    - Buffers are copied at every update, non-persistent ones too; with ``update_buffers`` those of
      a floating-point dtype are blended instead.
    - Sixteen-bit parameters have a float32 average.
    - The tensors of the source are found by name in the ``model`` that the update is given, and
      found again as soon as anything in it was re-assigned, converted or replaced.
    - Of a source that is sharded by FSDP2 each rank has the average of its own part: ``module`` is
      a bare module of parts, the state one of DTensors; whole tensors are loaded.
    - With an average in main memory and a source on a GPU an update is staged: it only sends the
      weights on their way. They are taken in at the next update, or as soon as anything of the
      average is read through this object.

    What each update did stands in ``record``, which is a part of the state.

    The other arguments are those of `ExpMomentumEMA`.
    """

    schedule_type: type = Schedule

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if '__init__' in cls.__dict__:
            cls.__init__ = _without_arguments_of_hook(cls.__init__)  # type: ignore[method-assign]

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
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
        refuse_pieces(model)
        check_integer('interval', interval)
        check_bool('update_buffers', update_buffers)
        check_bool('skip_non_finite', skip_non_finite)
        self.schedule = schedule
        self.interval = interval
        self.update_buffers = update_buffers
        self.skip_non_finite = skip_non_finite
        self.exclude = checked_patterns(exclude, unwrapped(model))
        self.module = averaged_copy(followed(model), as_device(device))
        # On the CPU wherever the weights are: it is read at every update, and reading it from an
        # accelerator would wait for all that the device has to do.
        self.register_buffer('steps', torch.tensor(0, device='cpu'))
        self._follower = None  # see update/follower.py; made at the first update
        # Whether tensors that are only copied wait for the next blend, or for the next read.
        # Not for a source that may have other numbers by then; EMAHook asks for it.
        self.defers_copies = False
        self._owed: tuple = ()  # the source of the copies that wait; no submodule of the average
        self._skip_counts = SkipCounts()
        self._skipped_before = 0  # tensors, in the run that was resumed
        self.record = Record()
        _question_decay(schedule)

    # --- the schedule -----------------------------------------------------------------------------

    def momentum_at(self, steps: int) -> float:
        """Return the momentum of the update that finds the counter at ``steps`` > 0."""
        return self.schedule.at(steps, self.interval)

    @property
    def current_momentum(self) -> float:
        """The momentum that the next blend will use; 1.0 where the next update copies."""
        steps = int(self.steps)
        due = math.ceil(steps / self.interval) * self.interval
        return self.momentum_at(due) if steps and not self.record.copy_is_due else 1.0

    def _schedule_with(self, **values) -> Schedule:
        return replace(self.schedule, **values)

    def _set_live(self, **values) -> None:
        self.schedule = self._schedule_with(**values)

    # --- the update -------------------------------------------------------------------------------

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
        steps = int(self.steps)
        momentum = self._momentum_due(steps)
        if momentum is None and self.defers_copies and not self.skip_non_finite:
            if not self._owed:
                note_owed(self)
            self._owed = (model,)
        else:
            self._owed = ()
            self._follow(model, momentum)
        settings = (self.schedule, self.interval, self.update_buffers, self.exclude)
        self.record.add(steps, momentum, settings)
        self.steps.add_(1)

    def _follow(self, model: nn.Module, momentum: float | None) -> None:
        average, source = self.module, unwrapped(model)
        if self._follower is None or not self._follower.holds(average, source):
            self._follower = None  # frees the memory of the old one first
            selection = Selection(self.update_buffers, self.exclude)
            skip_counts = self._skip_counts if self.skip_non_finite else None
            self._follower = follow(average, source, selection, skip_counts)
            self.record.copied = self._copied_against_the_rule(self._follower.copied)
        self._follower.update(momentum)

    def _copied_against_the_rule(self, copied: Iterable[str]) -> list[str]:
        names = map(canonical_name, copied)
        return [n for n in names if blends_by_rule(n, self.update_buffers, self.exclude)]

    def _momentum_due(self, steps: int) -> float | None:
        """Return the momentum of this update: 1 if it copies, None if it does not blend."""
        if steps == 0 or self.record.copy_is_due:
            return 1.0
        return self.momentum_at(steps) if steps % self.interval == 0 else None

    def avg_func(self, averaged_param: Tensor, source_param: Tensor, steps: int) -> None:
        """Blend one tensor: the plain form of an update, which blends all of them at once."""
        averaged_param.lerp_(source_param, self.momentum_at(int(steps)))

    # --- reading the average: a staged update is finished first -----------------------------------

    def _finish(self) -> None:
        owed = self.__dict__.get('_owed')
        if owed:
            self._owed = ()
            with torch.no_grad():
                self._follow(*owed, momentum=None)
        follower = self.__dict__.get('_follower')
        if follower is not None:
            follower.finish()

    @property
    def _modules(self) -> dict:
        # All ways of torch.nn.Module to the tensors go through here, but for attributes.
        self._finish()
        return self.__dict__['_modules']

    @_modules.setter
    def _modules(self, modules: dict) -> None:
        self.__dict__['_modules'] = modules

    @property
    def module(self) -> nn.Module:
        """The averaged copy of the model."""
        return self._modules['module']

    @property
    def avg_parameters(self) -> dict:
        """The averaged tensors by name, as BaseAveragedModel has them."""
        if self.update_buffers:
            return self.module.state_dict()
        return dict(self.module.named_parameters())

    @property
    def skipped(self) -> dict:
        """How often each tensor was left out because it was not finite."""
        self._finish()
        return self._skip_counts.read()

    def log_skipped(self) -> None:
        """Log the names of tensors that were left out, each once."""
        self._finish()
        self._skip_counts.log_new()

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give ``model`` the averaged weights."""
        finish_copies()
        for pair, _ in pairs_of(self.module, followed(model)):
            pair.source.copy_(pair.average)

    # --- the state --------------------------------------------------------------------------------

    def state_dict(self, *args, prefix: str = '', keep_vars: bool = False, **kwargs):
        """Return the state as torch does; no hook of the model takes the average's own entries."""
        state = super().state_dict(*args, prefix=prefix, keep_vars=keep_vars, **kwargs)
        own: dict = {}
        self._save_to_state_dict(own, prefix, keep_vars)
        # A hook is given the whole state, and may drop all that is not of its own module.
        state.update({key: value for key, value in own.items() if key not in state})
        return state

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Load a state of this class or of an EMA class of MMEngine, MMDetection or MMYOLO.

        Args:
            state_dict: ``steps`` and the averaged tensors under ``module.``.
            strict: Whether keys that the average does not know are an error, too.
            assign: As in torch.

        Raises:
            RuntimeError: If ``steps`` or an averaged tensor is missing, strict or not: the next
                update would replace the average, or blend random weights, and nothing would show
                it. Also if a shape differs, or the state is one of another schedule.
        """
        missing = sorted(set(state_keys(self)) - set(state_dict))
        if missing:
            raise RuntimeError(
                f'an EMA state must hold `steps` and every averaged tensor, but {listed(missing)} '
                'are missing. Resume from a whole checkpoint, or start from its weights alone '
                'with `load_from`.'
            )
        saved = {key[7:]: value for key, value in state_dict.items() if key.startswith('module.')}
        remake_buffers(self.module, {canonical_name(name): value for name, value in saved.items()})
        kwargs = {'assign': True} if assign else {}  # torch 2.0 does not know the argument
        return super().load_state_dict(state_dict, strict=strict, **kwargs)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.skip_non_finite:
            self.record.skipped = self._skipped_before + sum(self.skipped.values())
        destination[f'{prefix}record'] = self.record.encode()

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        self._finish()  # else the update on its way would change the state that is loaded
        saved, own = schedule_name(state_dict, prefix), self.schedule.name
        if saved not in (None, own):
            raise RuntimeError(
                f'an EMA state must be of the same schedule, but the state has {saved!r} and '
                f'{type(self).__name__} has {own!r}. Use the averaged model that wrote it, or '
                'start from its weights alone with `load_from`.'
            )
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )
        self.steps = self.steps.cpu()  # with assign=True it is the tensor of the state
        key = f'{prefix}record'
        unexpected[:] = [name for name in unexpected if name != key]
        if key in state_dict:
            self.record = Record.decode(state_dict[key])
        else:  # of another class, or of an older version
            self.record = self.record.restarted('loaded from a state without a record')
        if self.skip_non_finite:  # what is counted here from now on comes on top
            self._skipped_before = self.record.skipped - sum(self.skipped.values())

    def _apply(self, fn, *args, **kwargs):
        steps = self.steps
        super()._apply(fn, *args, **kwargs)
        self.steps = steps
        return self

    def __getstate__(self):
        # The follower holds the source; a copy or a pickle of the average must not take it along.
        self._finish()
        return {**self.__dict__, '_follower': None, 'defers_copies': False}


@MODELS.register_module()
class ExpMomentumEMA(MomentumAveragedModel):
    """Exponential moving average with a momentum that falls exponentially, as YOLO uses it.

    ``momentum(steps) = (1 - momentum) * exp(-(1 + steps) / gamma) + momentum``

    Takes the config of MMDetection's and MMYOLO's class of this name and gives, bit for bit in
    float32, MMYOLO's weights. The averaged tensors: see `MomentumAveragedModel`.

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

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1)
        >>> ema = ExpMomentumEMA(model, momentum=0.1, gamma=10)
        >>> ema.update_parameters(model)  # the first update copies
        >>> round(ema.current_momentum, 4)  # 0.9 * exp(-2 / 10) + 0.1
        0.8369

    Source: ``ModelEMA`` of YOLOv5; ``ExpMomentumEMA`` of MMDetection.
    """

    schedule_type = ExpSchedule
    momentum: float = LiveValue()
    gamma: float = LiveValue()

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
        schedule = ExpSchedule(momentum, gamma)
        super().__init__(
            model, schedule, interval, device, update_buffers, exclude, skip_non_finite
        )


def _question_decay(schedule: Schedule) -> None:
    momentum = getattr(schedule, 'momentum', 0)
    if momentum > 0.5:
        warn(
            f'momentum is {momentum:g}, the weight of the new value. Did you mean 1 - {momentum:g} '
            f'= {1 - momentum:.6g}?'
        )


def checked_patterns(exclude: Sequence[str], model: nn.Module) -> tuple:
    """Return the patterns of ``exclude``; raise an error if one matches no tensor of the model."""
    check_strings('exclude', exclude)
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


def schedule_name(state: dict, prefix: str = '') -> str | None:
    """Return the name of the schedule in an EMA state; None if the state does not say."""
    encoded = state.get(f'{prefix}schedule')
    if encoded is None:
        return None
    try:
        return bytes(encoded.tolist()).decode()
    except (AttributeError, TypeError, ValueError):  # of another library
        return 'an unknown one'


def as_device(device: Device) -> torch.device | None:
    """Return a torch.device with its index, or None."""
    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f'device must be a string or a torch.device, got {device!r}')
    try:
        return torch.empty(0, device=device).device  # 'cuda' is 'cuda:0'
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(
            f'device must name a torch device, got {device!r} ({reason}). Leave it out to keep the '
            'average where the model is.'
        ) from None
