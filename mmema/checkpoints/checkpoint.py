"""EMA state on disk: inspect, export, convert."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import warnings
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from .formats import FORMATS, CheckpointError, State, Weights, read_weights

PathLike = Union[str, Path]
WRITABLE = tuple(name for name, known in FORMATS.items() if known.write)


def trust_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read what MMEngine itself writes, and nothing else.

    That is torch's default since 2.6. MMEngine 0.10.7 neither expects it nor turns it off, so
    resuming and testing fail on the scalars which its message hub keeps in every checkpoint: a
    HistoryBuffer, made of two arrays and of references to its own methods. Naming just these opens
    MMEngine's files; switching the check off, the usual advice, would let any downloaded file run
    its code.
    """
    if not hasattr(torch.serialization, 'safe_globals'):  # before torch 2.5 it is not the default
        return
    array = np.empty(0).__reduce__()[0]  # numpy's private function, named otherwise before 2.0
    scalar = np.float64(0).__reduce__()[0]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            (_method_of_history_buffer, 'builtins.getattr'),
            np.ndarray,
            np.dtype,
            *{type(np.dtype(kind)) for kind in ('f8', 'f4', 'i8', 'i4', '?')},
            *((array, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
            *((scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
        ]
    )


def _method_of_history_buffer(owner, name):
    # Stands in for getattr, which a hostile file could use for more than this.
    if owner is not HistoryBuffer or name.startswith('_'):
        raise UnpicklingError(f'refusing to read attribute {name!r} of {owner!r} from a checkpoint')
    return getattr(owner, name)


# --- reading -----------------------------------------------------------------------------------


def load(path: PathLike, trust: bool = False) -> Weights:
    """Read a checkpoint of MMEngine or of another training code on the CPU.

    Nothing in the file is run: it is read with ``weights_only=True``.

    Args:
        path: A file of ``torch.save``, or a ``.safetensors`` file.
        trust: Whether the file may hold any object, as YOLOv5's do. Reading such a file can run
            code that is in it. Defaults to False.

    Returns:
        What is in it; see :class:`mmema.formats.Weights`.

    Raises:
        CheckpointError: If it is no such file, or damaged, or needs ``trust``.
    """
    path = Path(path)
    check_is_file(path)
    try:
        if path.suffix == '.safetensors':
            return read_safetensors(path)
        return read_weights(read_pickle(path, trust))
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from error


def check_is_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f'{path} is a folder; name a file in it')
    if not path.exists():
        raise CheckpointError(f'{path} does not exist (seen from {Path.cwd()})')
    if not path.is_file():
        raise CheckpointError(f'{path} is no ordinary file')
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path} is empty (0 bytes); whoever wrote it did not finish')


def read_pickle(path: Path, trust: bool):
    try:
        with plain_namespaces(), warnings.catch_warnings():
            # Else torch's remarks, such as on the protocol of the pickle, stand before our line.
            warnings.simplefilter('ignore', UserWarning)
            return torch.load(path, map_location='cpu', weights_only=not trust)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f'it holds objects of a package that is not at hand ({error}); run in the folder of '
            'the training code that wrote it, with PYTHONPATH=.'
        ) from error
    except Exception as error:  # torch raises five kinds for a damaged file, depending on where
        text = ' '.join(str(error).split())
        unknown = re.search(r'GLOBAL ([\w.]+)', text)
        if unknown and not trust:
            raise CheckpointError(
                f'it holds {unknown.group(1)}, and reading more than tensors and numbers can run '
                f'code that is in the file. If you trust it: --trust{on_old_torch()}'
            ) from error
        size = path.stat().st_size
        raise CheckpointError(
            f'it is damaged, cut short or no checkpoint at all ({size} bytes; '
            f'{type(error).__name__}: {text[:80]})'
        ) from error


def on_old_torch() -> str:
    if hasattr(torch.serialization, 'safe_globals'):
        return ''
    return f' (torch {torch.__version__} says so of all files of MMEngine, 2.5 and later do not)'


@contextmanager
def plain_namespaces() -> Iterator[None]:
    """Allow argparse's Namespace, in which timm and torchvision keep the command line."""
    if not hasattr(torch.serialization, 'safe_globals'):
        yield
        return
    with torch.serialization.safe_globals([argparse.Namespace]):
        yield


def read_safetensors(path: Path) -> Weights:
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(str(path), framework='pt') as file:
            state = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
            meta = json.loads((file.metadata() or {}).get('mmema', '{}'))
    except Exception as error:
        text = ' '.join(str(error).split())
        raise CheckpointError(
            f'it is no safetensors file, or a damaged one ({text[:80]})'
        ) from error
    return read_weights({'state_dict': state, 'meta': meta} if meta else state)


def import_safetensors():
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise CheckpointError('.safetensors needs a package: pip install safetensors') from None
    return safetensors


# --- inspect -----------------------------------------------------------------------------------


class Report(NamedTuple):
    """What :func:`inspect` has found.

    Attributes:
        weights: The content; see :class:`mmema.formats.Weights`.
        distance: ``||average - raw|| / ||raw||`` over the floating-point tensors that both have,
            BatchNorm's running statistics apart; None without both.
        farthest: The three tensors with the largest distance of their own, and that distance.
        non_finite: Names of tensors with NaN or infinity, by 'average' and 'raw'.
    """

    weights: Weights
    distance: Optional[float]
    farthest: List[tuple]
    non_finite: Dict[str, List[str]]

    def lines(self) -> List[tuple]:
        """Return (label, text), a line each."""
        found = self.weights
        lines = [('made by', found.maker)]
        for label, state, place in (
            ('EMA weights', found.average, found.average_at),
            ('raw weights', found.raw, found.raw_at),
        ):
            lines.append((label, 'none' if state is None else f'{place}: {summary(state)}'))
        if found.average is not None:
            lines.append(('updates', 'not said' if found.steps is None else f'{found.steps:,}'))
        lines += [(name, text) for name, text in live_lines(found.live)]
        if 'epoch' in found.meta:
            lines.append(
                ('trained', f'epoch {found.meta["epoch"]}, iteration {found.meta.get("iter", "?")}')
            )
        if self.distance is not None:
            lines.append(('distance', f'{self.distance:.3g} = ||EMA - raw|| / ||raw||'))
            lines += [('', f'{own:.3g}  {name}') for name, own in self.farthest]
        for which, names in self.non_finite.items():
            lines += [('NaN or infinity', f'{which}: {name}') for name in names[:10]]
            if len(names) > 10:
                lines.append(('', f'and {len(names) - 10} more'))
        if not any(self.non_finite.values()):
            lines.append(('NaN or infinity', 'none'))
        return lines + [('note', note) for note in found.notes]


def inspect(path: PathLike, trust: bool = False) -> Report:
    """Find out what a checkpoint holds.

    Args:
        path: The file; see :func:`load`.
        trust: See :func:`load`.

    Returns:
        The report.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    found = load(path, trust)
    distance, farthest = None, []
    if found.average is not None and found.raw is not None:
        distance, farthest = distances(found.average, found.raw)
    states = {'average': found.average or {}, 'raw': found.raw or {}}
    return Report(found, distance, farthest, {k: non_finite(v) for k, v in states.items()})


def distances(average: State, raw: State):
    """Return the relative distance of all weights, and the tensors that are farthest apart."""
    differences, norms, own = [], [], []
    for name, tensor in raw.items():
        other = average.get(name)
        if not comparable(name, tensor, other):
            continue
        norm = tensor.double().norm().item()
        difference = (other.double() - tensor.double()).norm().item()
        differences.append(difference)
        norms.append(norm)
        own.append((name, relative(difference, norm)))
    if not norms:
        return None, []
    total = sum(n * n for n in norms) ** 0.5
    apart = sum(d * d for d in differences) ** 0.5
    farthest = sorted((o for o in own if o[1] > 0), key=lambda pair: -pair[1])[:3]
    return relative(apart, total), farthest


def relative(difference: float, norm: float) -> float:
    if difference == 0:
        return 0.0  # two tensors of zeros too
    return difference / norm if norm else difference * float('inf')


def comparable(name: str, tensor: Tensor, other: Optional[Tensor]) -> bool:
    if name.endswith(('running_mean', 'running_var')):
        return False
    return tensor.is_floating_point() and other is not None and other.shape == tensor.shape


def non_finite(state: State) -> List[str]:
    return [
        name
        for name, tensor in state.items()
        if tensor.is_floating_point() and not is_finite(tensor)
    ]


def is_finite(tensor: Tensor) -> bool:
    if tensor.element_size() == 1:  # torch has no isfinite for float8
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def summary(state: State) -> str:
    kinds = sorted({str(tensor.dtype)[6:] for tensor in state.values()})
    numbers = sum(tensor.numel() for tensor in state.values())
    return f'{len(state)} tensors, {numbers:,} numbers, {", ".join(kinds)}'


def live_lines(live: dict) -> Iterator[tuple]:
    for name, value in live.items():
        if isinstance(value, Tensor) and value.dim() == 0:
            number = value.item()
            yield name, f'{number:g}' if isinstance(number, float) else str(number)


# --- export ------------------------------------------------------------------------------------


def export(
    path: PathLike,
    out: PathLike,
    weights: str = 'ema',
    force: bool = False,
    trust: bool = False,
    named_by_hash: bool = True,
) -> Path:
    """Write one set of weights to a file of its own, for inference.

    A ``.pth`` file is one that ``init_detector`` of MMDetection and MMYOLO loads; it keeps the
    ``meta`` of the run, with the classes and the config. Tensors keep their dtype. A file is
    either written whole or not at all.

    Args:
        path: The checkpoint; see :func:`load`.
        out: Where to write, ``.pth`` or ``.safetensors``.
        weights: 'ema' or 'raw'. Defaults to 'ema'.
        force: Whether an existing file may be replaced. Defaults to False.
        trust: See :func:`load`.
        named_by_hash: Whether ``name.pth`` becomes ``name-<first 8 digits of its sha256>.pth``, as
            OpenMMLab publishes. Defaults to True.

    Returns:
        The path of the new file.

    Raises:
        CheckpointError: If the checkpoint cannot be read, has no such weights, or the new file
            cannot be written.
    """
    out = Path(out)
    if weights not in ('ema', 'raw'):
        raise CheckpointError(f"weights must be 'ema' or 'raw', got {weights!r}")
    check_output(out, ('.pth', '.safetensors'), force or named_by_hash)
    found = load(path, trust)
    state, other = (found.average, 'raw') if weights == 'ema' else (found.raw, 'ema')
    if state is None and found.kind == 'state_dict':
        raise CheckpointError(
            f'{path}: {found.notes[0]}; say --weights raw to take them as they are'
        )
    if state is None:
        raise CheckpointError(
            f'{path} has no {"EMA" if weights == "ema" else "raw"} weights; --weights {other} '
            'takes those that it has'
        )
    meta = {**found.meta, 'mmema': {'weights': weights, 'steps': found.steps}}
    state = compact(state)
    if out.suffix == '.safetensors':
        write = lambda file: file.write(safetensors_bytes(state, meta))  # noqa: E731
    else:
        write = lambda file: torch.save({'meta': meta, 'state_dict': state}, file)  # noqa: E731
    return write_whole(out, write, force, named_by_hash)


def compact(state: State) -> State:
    """Let every tensor own its memory, unless several share one whole."""
    small = OrderedDict(
        (k, t if t.untyped_storage().nbytes() == t.nbytes else t.clone()) for k, t in state.items()
    )
    if hasattr(state, '_metadata'):
        small._metadata = state._metadata
    return small


def safetensors_bytes(state: State, meta: dict) -> bytes:
    safetensors = import_safetensors()
    # The format has neither shared memory nor strides: tied tensors are written once for each name.
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    about = {
        'mmema': meta['mmema'],
        'dataset_meta': meta.get('dataset_meta'),
        'cfg': str(meta.get('cfg', '')),
    }
    text = json.dumps({k: v for k, v in about.items() if v}, default=str)
    return safetensors.torch.save(contiguous, metadata={'format': 'pt', 'mmema': text})


# --- convert -----------------------------------------------------------------------------------


def convert(
    path: PathLike,
    out: PathLike,
    to: str = 'mmema',
    steps: Optional[int] = None,
    momentum: Optional[float] = None,
    gamma: Optional[float] = None,
    rename: Optional[Dict[str, str]] = None,
    force: bool = False,
    trust: bool = False,
) -> List[str]:
    """Write the average, the raw weights and the counter as another training code keeps them.

    ``steps``, ``updates`` and ``n_averaged`` are the same number. Optimizers are not converted.
    The decay is not either, for none of the files holds it: it is in the config, see
    docs/migration.md.

    Args:
        path: The checkpoint; see :func:`load`.
        out: The new file, ``.pth`` or ``.pt``.
        to: One of ``WRITABLE``. A Runner resumes from 'mmema' and 'mmengine' at epoch 0 with
            ``resume=True``, with a new optimizer. Defaults to 'mmema'.
        steps: The number of updates, where the file does not say. Defaults to None.
        momentum: Only with ``to='mmema'`` and ``gamma``: the schedule of
            RestartableExpMomentumEMA, to be used in place of the config's. Defaults to None.
        gamma: See ``momentum``.
        rename: New beginnings of names by old ones; the longest that fits is used.
        force: Whether an existing file may be replaced. Defaults to False.
        trust: See :func:`load`.

    Returns:
        What got lost or had to be assumed, a line each.

    Raises:
        CheckpointError: If the checkpoint cannot be read or converted, or the new file cannot be
            written.
    """
    out = Path(out)
    check_output(out, ('.pth', '.pt'), force)
    if to not in WRITABLE:
        raise CheckpointError(f'to must be one of {", ".join(WRITABLE)}, got {to!r}')
    found = load(path, trust)
    notes = list(found.notes)
    set_live(found, to, momentum, gamma)
    set_steps(found, to, steps, path)
    fill_in(found, to, notes)
    for which in ('average', 'raw'):
        state = getattr(found, which)
        setattr(found, which, state and compact(renamed(state, rename or {})))
    content = FORMATS[to].write(found)
    write_whole(out, lambda file: torch.save(content, file), force, named_by_hash=False)
    return notes


def set_live(found: Weights, to: str, momentum: Optional[float], gamma: Optional[float]) -> None:
    if momentum is None and gamma is None:
        return
    if to != 'mmema' or momentum is None or gamma is None:
        raise CheckpointError('momentum and gamma are given together, and only with --to mmema')
    if not 0 < momentum < 1:
        raise CheckpointError(f'momentum must be in (0, 1), got {momentum}: it is 1 - decay')
    if not 0 < gamma < float('inf'):
        raise CheckpointError(f'gamma must be above 0, got {gamma}')
    found.live = {
        'momentum': torch.tensor(momentum, dtype=torch.float64),
        'gamma': torch.tensor(gamma, dtype=torch.float64),
        'changed': torch.tensor([True, True]),  # else the config's values would win
        'restarts': found.live.get('restarts', torch.tensor(0)),
    }


def set_steps(found: Weights, to: str, steps: Optional[int], path: PathLike) -> None:
    if steps is not None and steps < 0:
        raise CheckpointError(f'steps must be at least 0, got {steps}')
    found.steps = found.steps if steps is None else steps
    if found.steps is None and 'steps' in FORMATS[to].keeps:
        raise CheckpointError(
            f'{path} does not say how many updates its average has had; --steps N does (iterations '
            'trained, for most codes). The warm-up of the schedule goes on from there'
        )


def fill_in(found: Weights, to: str, notes: List[str]) -> None:
    keeps = FORMATS[to].keeps
    if found.average is None:
        found.average = found.raw
        notes.append('no EMA weights in the file: the average is a copy of the raw weights')
    elif found.raw is None and 'raw' in keeps:
        found.raw = found.average
        notes.append('no raw weights in the file: training goes on from the average')
    elif found.raw is not None and 'raw' not in keeps:
        notes.append(f'{to} keeps no raw weights: they are left out')
    if 'steps' not in keeps and found.steps is not None:
        notes.append(f'{to} keeps no counter: {found.steps} updates are left out')
    if found.live and to != 'mmema':
        names = ', '.join(name for name, _ in live_lines(found.live))
        notes.append(f'{to} keeps no schedule: {names} are left out')


def renamed(state: State, rename: Dict[str, str]) -> State:
    if not rename:
        return state
    unused = [old for old in rename if not any(name.startswith(old) for name in state)]
    if unused:
        raise CheckpointError(
            f'no name begins with {unused[0]!r}; the first is {next(iter(state), None)!r}'
        )
    new = {}
    for name, tensor in state.items():
        fits = [old for old in rename if name.startswith(old)]
        best = max(fits, key=len) if fits else ''
        key = rename[best] + name[len(best) :] if fits else name
        if key in new:
            raise CheckpointError(f'after renaming, two tensors would be called {key!r}')
        new[key] = tensor
    return OrderedDict(new)


# --- writing -----------------------------------------------------------------------------------


def check_output(out: Path, suffixes: tuple, may_exist: bool) -> None:
    if out.is_dir():
        raise CheckpointError(f'{out} is a folder; name a file in it')
    if out.suffix not in suffixes:
        raise CheckpointError(f'the new file must end in {" or ".join(suffixes)}, got {out.name}')
    if not out.parent.is_dir():
        raise CheckpointError(f'there is no folder {out.parent} for the new file')
    if out.exists() and not may_exist:
        raise CheckpointError(f'{out} exists; --force replaces it')


def write_whole(out: Path, write: Callable, force: bool, named_by_hash: bool) -> Path:
    """Write a file beside its place and move it there when it is complete."""
    partial = out.with_name(f'.{out.name}.{os.getpid()}.part')
    try:
        with open(partial, 'wb') as file:
            write(file)
        if named_by_hash:
            out = out.with_name(f'{out.stem}-{sha256(partial)[:8]}{out.suffix}')
            check_output(out, (out.suffix,), force)
        os.replace(partial, out)
    except (OSError, RuntimeError) as error:  # torch gives RuntimeError for a full disk
        raise CheckpointError(f'{out} cannot be written: {error}') from error
    finally:
        if partial.exists():
            partial.unlink()
    return out


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        for block in iter(lambda: file.read(1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()
