"""The one description of a run: its facts, switches, metric, scalars and checkpoints."""

from .facts import Moment, RunFacts, facts_in_config, facts_of
from .live import (
    averages_of,
    checkpoint_hooks,
    choose_checkpoint,
    ema_hook_of,
    finish_saving,
    kept_rng,
    last_of,
    now_of,
    refuse_stock_hook,
    the_ema_hook,
    validation_follows,
    what_loads,
)
from .metrics import less_is_better, watched_metric
from .switches import SWITCH_HOOKS, switches_of
