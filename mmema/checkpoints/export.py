"""Export of one set of weights to a file of its own, for inference."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path

import torch

from .files import check_output, import_safetensors, load, write_whole
from .formats import CheckpointError, State


def export(
    path: str | Path,
    out: str | Path,
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
        path: The checkpoint; see :func:`mmema.checkpoints.files.load`.
        out: The new file, ``.pth`` or ``.safetensors``.
        weights: 'ema' or 'raw'. Defaults to 'ema'.
        force: Whether an existing file may be replaced. Defaults to False.
        trust: Whether the file may hold any object; see :func:`mmema.checkpoints.files.load`.
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
    states = {'ema': found.average, 'raw': found.raw}
    state = states[weights]
    if state is None:
        has = [name for name, state in states.items() if state is not None]
        if found.kind == 'state_dict':
            raise CheckpointError(f"{path}: {found.notes[0]}; weights='raw' takes them as they are")
        raise CheckpointError(
            f'{path} has no {weights} weights; weights={has[0]!r} takes those that it has'
        )
    meta = {**found.meta, 'mmema': {'weights': weights, 'steps': found.steps}}
    state = compact(state)
    if out.suffix == '.safetensors':
        write = lambda file: file.write(_safetensors_bytes(state, meta))  # noqa: E731
    else:
        write = lambda file: torch.save({'meta': meta, 'state_dict': state}, file)  # noqa: E731
    return write_whole(out, write, force, named_by_hash)


def compact(state: State) -> State:
    """Return the state with tensors that own their memory, unless several share one whole."""
    small = OrderedDict(
        (k, t if t.untyped_storage().nbytes() == t.nbytes else t.clone()) for k, t in state.items()
    )
    if hasattr(state, '_metadata'):
        small._metadata = state._metadata
    return small


def _safetensors_bytes(state: State, meta: dict) -> bytes:
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
