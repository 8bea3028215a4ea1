"""What several hooks need to know of a run."""

from __future__ import annotations

from mmengine.hooks import EMAHook as StockEMAHook


def ema_hook_of(runner) -> StockEMAHook:
    """Return the run's EMAHook, the stock one or ours.

    Raises:
        ValueError: If the run has none, or several.
    """
    found = [hook for hook in runner.hooks if isinstance(hook, StockEMAHook)]
    if len(found) != 1:
        raise ValueError(
            f'the run must have one EMAHook, got {len(found)}. Add to custom_hooks: '
            "dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA')"
        )
    return found[0]
