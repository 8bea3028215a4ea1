"""Names of the averages of a run, in checkpoints, messages and logged scalars."""

MAIN = 'ema'


def label_of(name: str) -> str:
    """Return what messages call an average."""
    return 'the average' if name == MAIN else f'also[{name!r}]'


def scalars_of(name: str) -> str:
    """Return the prefix of an average's scalars: its momentum is ``train/ema_short_momentum``."""
    return 'train/ema_' if name == MAIN else f'train/ema_{name}_'
