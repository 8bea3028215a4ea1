"""The parts of a run in the record of an average: a start or a resume each."""

from __future__ import annotations

from mmengine.dist import get_world_size
from mmengine.hooks import EMAHook as StockEMAHook
from mmengine.runner import Runner

from ..record import Record
from .batch import loader_batch
from .facts import facts_of


def begin_part(record: Record, runner: Runner, ema_hook: StockEMAHook) -> None:
    """Add the part of a run that begins now to the record of an average."""
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
    record.parts.append(part)
