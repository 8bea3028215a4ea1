"""The one description of a run: its facts, switches, metric, scalars and checkpoints."""

from .batch import auto_scale_base, batch_of_update
from .facts import Moment, RunFacts, facts_in_config, facts_of
from .live import (
    averages_of,
    checkpoint_hooks,
    choose_checkpoint,
    ema_hook_of,
    folders_of,
    kept_rng,
    last_of,
    make_up_validation,
    now_of,
    refuse_late_ema_hook,
    tell_what_is_lost,
    the_ema_hook,
    validation_follows,
    validations_of,
    what_loads,
)
from .metrics import less_is_better, watched_metric
from .names import MAIN, label_of, scalars_of
from .record import begin_part
from .strategies import StrategyTraits, checked_source, refuse_unsaved, traits_of
from .switches import SWITCH_HOOKS, switches_of
