"""Config of the averages of a run: the main one, and those beside it in ``also``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields

from mmengine.registry import MODELS

from ..averaged import MomentumAveragedModel
from ..messages import listed
from ..restartable import Restartable
from ..restarts.rule import RestartRule
from .units import parsed_horizon

# 'raw' and 'ema' name weights already, and scalars of restarts begin with 'ema_set_'.
RESERVED = ('raw', 'ema', 'set')


@dataclass(frozen=True)
class AverageConfig:
    """The arguments of one average, checked as far as they can be without a model."""

    ema_type: str | type
    arguments: dict = field(default_factory=dict)
    horizon: str | float | None = None
    rule: RestartRule | None = None  # only of an average in `also`

    def __post_init__(self) -> None:
        if self.horizon is not None:
            parsed_horizon(self.horizon)
        cls = class_of(self.ema_type)
        if cls is None:
            return  # imported later; building it fails then
        wrong = [name for name in self.arguments if not takes(cls, name)]
        if wrong:
            names = [name for name in inspect.signature(cls).parameters if name != 'model']
            raise TypeError(
                f'EMAHook passes its other arguments to {cls.__name__}, which takes '
                f'({", ".join(names)}), got {listed(wrong)}'
            )
        both = 'momentum' in self.arguments
        if self.horizon is not None and (both or not takes(cls, 'momentum')):
            raise ValueError(
                f'horizon must come in place of momentum, but {cls.__name__} '
                + ('got both' if both else 'has no momentum')
            )
        if issubclass(cls, MomentumAveragedModel):
            own = {f.name for f in fields(cls.schedule_type)} & set(self.arguments)
            cls.schedule_type(**{name: self.arguments[name] for name in own})
        if self.rule is not None and not issubclass(cls, Restartable):
            raise ValueError(f'restart needs a restartable average, got {cls.__name__}')


def also_configs(also: dict | None, main: AverageConfig) -> dict:
    """Return the configs of the averages in ``also``, by name; an error names the entry."""
    if not isinstance(also or {}, dict):
        raise TypeError(f'also must be a dict of averages by name, got {also!r}')
    configs = {}
    for name, given in (also or {}).items():
        if not isinstance(name, str) or not name.isidentifier() or name in RESERVED:
            raise ValueError(
                f'a name in also must be an identifier, none of {RESERVED}, got {name!r}'
            )
        if not isinstance(given, dict):
            raise TypeError(f'also[{name!r}] must be a dict of arguments, got {given!r}')
        try:
            configs[name] = _beside(main, given)
        except (TypeError, ValueError) as error:
            raise type(error)(f'also[{name!r}]: {error}') from None
    return configs


def _beside(main: AverageConfig, settings: dict) -> AverageConfig:
    """Return the config of an average of ``also``; what its settings lack is the main one's."""
    given = dict(settings)
    ema_type, horizon, restart = (given.pop(k, None) for k in ('ema_type', 'horizon', 'restart'))
    ema_type = main.ema_type if ema_type is None else ema_type
    cls = class_of(ema_type)
    if cls is None:
        raise ValueError(f'ema_type must name an averaged model, got {ema_type!r}')
    arguments = {name: value for name, value in main.arguments.items() if takes(cls, name)}
    if horizon is not None:
        arguments.pop('momentum', None)
    elif 'momentum' not in given and takes(cls, 'momentum'):
        horizon = main.horizon
    rule = None if restart is None else _rule_beside(restart)
    return AverageConfig(ema_type, {**arguments, **given}, horizon, rule)


def _rule_beside(arguments: dict) -> RestartRule:
    if not isinstance(arguments, dict):
        raise TypeError(f'restart must be a dict of arguments, got {arguments!r}')
    known = [f.name for f in fields(RestartRule) if f.init and f.name != 'source']
    wrong = [name for name in arguments if name not in (*known, 'source')]
    if wrong:
        raise TypeError(f'restart takes ({", ".join(known)}), got {listed(wrong)}')
    rule = RestartRule(**arguments)
    if 'source' in arguments or rule.plateau and rule.plateau.source:
        raise ValueError(
            'an average of also must not change the training, but restart has a source. Leave it '
            'out, or restart the main average with an EMARestartHook.'
        )
    return rule


def class_of(ema_type: str | type) -> type | None:
    """Return an averaged model by its name in the registry; None if it is not known yet."""
    if isinstance(ema_type, type):
        return ema_type
    with MODELS.switch_scope_and_registry(None) as registry:
        return registry.get(ema_type)


def takes(cls: type, name: str) -> bool:
    """Return whether an averaged model takes an argument, by name or by ``**kwargs``."""
    parameters = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name != 'model' and (name in parameters or takes_any)
