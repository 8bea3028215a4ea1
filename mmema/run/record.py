"""The parts of a run in the record of an average: a start or a resume each."""

from __future__ import annotations

from typing import Iterable, Sequence

from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.runner import Runner

from ..record import Record
from .batch import loader_batch
from .facts import facts_of


def begin_part(records: Iterable[Record], runner: Runner, ema_hook: StockEMAHook) -> None:
    """Add the part of a run that begins now to the records of its averages."""
    facts = facts_of(runner, ema_hook)
    part = {
        'iteration': runner.iter,
        'epoch': runner.epoch,
        'epoch_length': facts.epoch_length,
        'batch': loader_batch(runner.train_dataloader),
        'ranks': get_world_size(),
        'accumulation': facts.accumulation,
        'begin': facts.begin,
        'log': runner.timestamp,  # the folder of its log
    }
    for record in records:
        record.parts.append(dict(part))


def iteration_of_epoch(parts: Sequence[dict], epoch: int) -> int:
    """Return the first iteration at which so many epochs of a run were over.

    Args:
        parts: Those of a run by epochs, in the order of time.
        epoch: 0-based index of the epoch that begins there.
    """
    at = 0
    for part, following in zip(parts, [*parts[1:], None]):
        at = part['iteration'] + max(epoch - part['epoch'], 0) * part['epoch_length']
        if following is None or at < following['iteration']:
            break
    return at


def epochs_until(parts: Sequence[dict], iteration: int) -> float:
    """Return how many epochs of a run by epochs were over after so many iterations."""
    part = [one for one in parts if one['iteration'] < iteration or one is parts[0]][-1]
    return part['epoch'] + (iteration - part['iteration']) / part['epoch_length']


def parts_until(parts: Sequence[dict], iteration: int) -> list[dict]:
    """Return the parts that began before an iteration; all that is known of a run in a file."""
    return [part for part in parts if part['iteration'] < iteration]
