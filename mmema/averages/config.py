"""Config of the averages of a run: the main one, and those beside it in ``also``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields

from mmengine.registry import MODELS

from ..averaged import MomentumAveragedModel
from ..messages import listed
from ..restartable import Restartable
from ..restarts.rule import RestartRule
from ..run.horizons import is_ladder, parsed_horizon, rungs_of

# 'raw' and 'ema' name weights already, and scalars of restarts begin with 'ema_set_'.
RESERVED = ('raw', 'ema', 'set')
DEFAULT_TYPE = 'mmema.RestartableExpMomentumEMA'
RUNG_TYPE = 'mmema.RestartableAnnealingEMA'
# Blends of the warm-up of a rung, max(1 / horizon, WARM_UP / (WARM_UP + blends)): an average so far
# remembers about the last half of what there is, however long the run.
WARM_UP = 2


@dataclass(frozen=True)
class AverageConfig:
    """The arguments of one average, checked as far as they can be without a model."""

    ema_type: str | type
    arguments: dict = field(default_factory=dict)
    horizon: str | float | None = None
    rule: RestartRule | None = None  # only of an average in `also`
    # The warm-up in blends, of a rung of a ladder: gamma follows when the interval is known.
    blends_of_gamma: float | None = None

    @property
    def auto_interval(self) -> bool:
        """Whether the horizon decides the interval."""
        return self.arguments.get('interval') == 'auto'

    @property
    def of_model(self) -> dict:
        """The settings of the averaged model as it can be built before the run is known."""
        known = {k: v for k, v in self.arguments.items() if k != 'interval' or v != 'auto'}
        return {**known, 'type': self.ema_type}

    def __post_init__(self) -> None:
        if self.horizon is not None:
            parsed_horizon(self.horizon)
        elif self.auto_interval:
            raise ValueError("interval='auto' must come with a horizon, got none")
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


def ladder_configs(horizon, ema_type: str | type, given: dict) -> dict[str, AverageConfig]:
    """Return the configs of the rungs of a ladder, by name; empty where ``horizon`` is none."""
    if not is_ladder(horizon):
        return {}
    if ema_type != DEFAULT_TYPE:
        raise ValueError(
            f'a ladder has averages of its own, but horizon={horizon!r} came with '
            f'ema_type={ema_type!r}. Leave ema_type out.'
        )
    fixed = [name for name in ('momentum', 'gamma') if name in given]
    if fixed:
        raise ValueError(
            f'horizon must come in place of momentum and gamma, but horizon={horizon!r} came with '
            f'{fixed[0]}={given[fixed[0]]!r}. Leave {fixed[0]} out.'
        )
    # Statistics of BatchNorm that are copied belong to other weights than those of a long average.
    arguments = {'interval': 'auto', 'gamma': WARM_UP, 'update_buffers': True, **given}
    return {
        rung.name: AverageConfig(
            RUNG_TYPE, arguments, horizon=rung.horizon, blends_of_gamma=WARM_UP
        )
        for rung in rungs_of(horizon)
    }


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
    if horizon is None and main.auto_interval:
        arguments.pop('interval', None)
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
