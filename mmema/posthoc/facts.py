"""Facts of a checkpoint that tell how its averages were made; its tensors are not kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Sequence

import numpy as np

from ..averaged import schedule_name
from ..checkpoints.files import content_of, named
from ..checkpoints.formats import CheckpointError, Weights, read_weights
from ..messages import listed
from ..record import Record
from ..run import MAIN, RunFacts, facts_in_config
from ..run.config import ema_hook_in, hooks_in, kind_of, read_config
from ..run.record import epochs_until, iteration_of_epoch, parts_until


@dataclass(frozen=True)
class AverageFacts:
    """Counter, live values and restarts of one average in a checkpoint."""

    steps: int
    schedule: str | None = None  # None: of a class that saves its counter alone
    live: dict = field(default_factory=dict)  # live values by name
    changed: frozenset = frozenset()  # those that a restart or an assignment has set
    restarts: int = 0
    rules: Sequence[dict] = ()  # states of its restart rules
    record: Record | None = None  # of its updates; None: of a class or a version without one


@dataclass(frozen=True)
class FileFacts:
    """Facts of a checkpoint of an MMEngine run."""

    file: Path
    iteration: int  # that are over
    seed: int | None
    losses: np.ndarray | None  # of all iterations, by which files of one run are known
    meta: dict
    config: dict  # plain values of meta['cfg']
    run: RunFacts
    averages: dict[str, AverageFacts]  # by name; the main one is 'ema'
    has_raw: bool
    tensors: dict[str, tuple]  # shape and dtype of the weights by name

    def __str__(self) -> str:
        return str(self.file)

    @property
    def hook(self) -> dict:
        """The settings of the run's EMAHook, as far as the config tells them; else none."""
        return ema_hook_in(self.config)

    @property
    def recalibrates(self) -> bool:
        """Whether the run measured the BatchNorm statistics of its average."""
        return any(kind_of(hook) == 'EMARecalibrateHook' for hook in hooks_in(self.config))

    @property
    def updates(self) -> int:
        """Updates that the run made until this file, where it has no record and skipped none."""
        return self.run.update_of(self.iteration)

    @property
    def parts(self) -> list[dict]:
        """The parts of the run so far, a start or a resume each; none where nothing tells them."""
        records = [average.record for average in self.averages.values() if average.record]
        parts = max((record.parts for record in records), key=len, default=[])
        return parts_until(parts, self.iteration)

    @property
    def time(self) -> str:
        """The epoch that the file ends, else its iteration, in words."""
        epoch = None
        if self.run.by_epoch:
            epoch = epochs_until(self.parts or [self._whole_run()], self.iteration)
            if not self.parts and epoch != self.meta.get('epoch', epoch):
                epoch = None  # an epoch had another length before the run was resumed
        ends = epoch is not None and epoch == int(epoch)
        return f'epoch {epoch:.0f}' if ends else f'iteration {self.iteration}'

    def iteration_of(self, begin: int) -> int:
        """Return the iteration at which an epoch begins, or that of a run by iterations."""
        if not self.run.by_epoch:
            return begin
        first = self.parts[0] if self.parts else None
        if first and begin < first['epoch']:
            raise CheckpointError(
                f'{self} does not say where epoch {begin} began: the run has a record from epoch '
                f'{first["epoch"]} on'
            )
        return iteration_of_epoch(self.parts or [self._whole_run()], begin)

    def _whole_run(self) -> dict:
        return {'iteration': 0, 'epoch': 0, 'epoch_length': self.run.epoch_length}


def facts_in(path: str | Path, trust: bool = False) -> FileFacts:
    """Read the facts of a checkpoint.

    Raises:
        CheckpointError: If it cannot be read, or is not of an MMEngine run.
    """
    content = content_of(path, trust)
    with named(path):
        return _facts(Path(path), content, read_weights(content))


def _facts(path: Path, content: dict, weights: Weights) -> FileFacts:
    meta, hub = weights.meta, content.get('message_hub')
    if not isinstance(hub, dict) or 'iter' not in meta:
        raise CheckpointError(
            'it is not the checkpoint of an MMEngine run, which says after which iteration it was '
            'written' + (' (an exported file)' if weights.exported else '')
        )
    config, info = read_config(str(meta.get('cfg', ''))), hub.get('runtime_info') or {}
    iteration = int(meta['iter'])
    iterations = int(info.get('max_iters') or iteration)
    epoch_length = iterations // max(int(info.get('max_epochs') or 1), 1)
    state = weights.average if weights.average is not None else weights.raw
    averages = {}
    if weights.steps is not None and weights.raw is not None:
        averages[MAIN] = _average_facts(weights, content.get('ema_restart'))
        for name, other in weights.also.items():
            restart = content['ema_also'][name].get('restart')
            if other.steps is not None:
                averages[name] = _average_facts(other, [restart] if restart else ())
    return FileFacts(
        file=path,
        iteration=iteration,
        seed=meta.get('seed'),
        losses=_losses(hub, iteration),
        meta=meta,
        config=config,
        run=facts_in_config(
            config, epoch_length, max(iterations, iteration), content.get('ds_config')
        ),
        averages=averages,
        has_raw=weights.raw is not None,
        tensors={name: (tuple(t.shape), t.dtype) for name, t in state.items()},
    )


def _average_facts(weights: Weights, rules) -> AverageFacts:
    state = weights.live
    values = {k: v.item() for k, v in state.items() if v.dim() == 0}
    changed = {key[8:] for key, value in values.items() if key.startswith('changed.') and value}
    live = {k: v for k, v in values.items() if k != 'restarts' and not k.startswith('changed.')}
    return AverageFacts(
        weights.steps,
        # mmema 0.1.0 had one schedule, and did not name it.
        schedule_name(state) or ('exp' if state else None),
        live,
        frozenset(changed),
        int(values.get('restarts', 0)),
        tuple(rules or ()),
        weights.record,
    )


def _losses(hub: dict, iteration: int) -> np.ndarray | None:
    """Return the loss of every iteration; None where the file does not have them all."""
    scalars = hub.get('log_scalars') or {}
    history = getattr(scalars.get('train/loss'), '_log_history', None)
    if history is None or len(history) != iteration:
        return None
    return np.array(history, dtype=float)


def check_same_model(one: FileFacts, other: FileFacts) -> None:
    """Raise CheckpointError unless two files have weights of the same names, shapes and dtypes."""
    names = [
        name
        for name in {**one.tensors, **other.tensors}
        if one.tensors.get(name) != other.tensors.get(name)
    ]
    if names:
        raise CheckpointError(
            f'{one} and {other} must have weights of one model, but differ in {listed(names)}'
        )


def check_same_run(one: FileFacts, other: FileFacts) -> list[str]:
    """Raise CheckpointError unless two files are of one run, the first one earlier.

    A resumed run keeps its seed, and the loss of every iteration. Returns a note where the files do
    not have all losses.
    """
    check_same_model(one, other)
    if one.iteration >= other.iteration:
        raise CheckpointError(
            f'{one} must be earlier in the run than {other}, but it is of iteration '
            f'{one.iteration} and the other of {other.iteration}'
        )
    if one.seed != other.seed:
        raise CheckpointError(
            f'{one} and {other} must be of one run, but their seeds are {one.seed} and {other.seed}'
        )
    if one.parts and other.parts and one.parts != parts_until(other.parts, one.iteration):
        raise CheckpointError(
            f'{one} and {other} must be of one run, but the later one was resumed from before '
            f'iteration {one.iteration}: the earlier file is of what was done again'
        )
    if one.losses is None or other.losses is None:
        return [f'whether {one} and {other} are of one run is not sure: they lack train/loss']
    earlier = other.losses[: one.iteration]
    different = np.flatnonzero(~np.isclose(one.losses, earlier, 0, 0, equal_nan=True))
    if len(different):
        raise CheckpointError(
            f'{one} and {other} must be of one run, but their losses differ from iteration '
            f'{different[0] + 1} on'
        )
    return []
