"""Export of one set of weights to a file of its own, for inference."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from .files import load, write_whole
from .formats import CheckpointError, State, with_metadata


def export(
    path: str | Path,
    out: str | Path,
    weights: str = 'ema',
    force: bool = False,
    trust: bool = False,
    named_by_hash: bool = True,
    record: dict | None = None,
) -> Path:
    """Write one set of weights to a file of its own, for inference.

    A ``.pth`` file is one that ``init_detector`` of MMDetection and MMYOLO loads; it keeps the
    ``meta`` of the run, with the classes and the config. Tensors keep their dtype. A file is
    either written whole or not at all.

    Args:
        path: The checkpoint; see :func:`mmema.checkpoints.files.load`.
        out: The new file, ``.pth`` or ``.safetensors``.
        weights: 'ema', 'raw', or the name of another average of the run. Defaults to 'ema'.
        force: Whether an existing file may be replaced. Defaults to False.
        trust: Whether the file may hold any object; see :func:`mmema.checkpoints.files.load`.
        named_by_hash: Whether ``name.pth`` becomes ``name-<first 8 digits of its sha256>.pth``, as
            OpenMMLab publishes. Defaults to True.
        record: More about the weights to keep in ``meta['mmema']``. Defaults to None.

    Returns:
        The path of the new file.

    Raises:
        CheckpointError: If the checkpoint cannot be read, has no such weights, or the new file
            cannot be written.
    """
    out = Path(out)
    found = load(path, trust)
    sets = found.sets()
    if weights not in sets:
        why = f' ({"; ".join(found.notes)})' if found.notes else ''
        raise CheckpointError(f'{path} has no {weights} weights{why}; it has {", ".join(sets)}')
    steps = found.also.get(weights, found).steps
    about = {'weights': weights, 'steps': steps, **found.exported, **(record or {})}
    meta = {**found.meta, 'mmema': about}
    return write_weights(out, compact(sets[weights]), meta, force, named_by_hash)


def write_weights(
    out: Path, state: State, meta: dict, force: bool = False, named_by_hash: bool = False
) -> Path:
    """Write weights and ``meta`` to a new file; see :func:`export` for arguments and errors."""

    def write(file):
        if out.suffix == '.safetensors':
            file.write(_safetensors_bytes(state, meta))
        else:
            torch.save({'meta': meta, 'state_dict': state}, file)

    return write_whole(out, write, ('.pth', '.safetensors'), force, named_by_hash)


def compact(state: State) -> State:
    """Return the state with tensors that own their memory, unless several share one whole."""
    size = {k: t.numel() * t.element_size() for k, t in state.items()}  # nbytes: since torch 2.1
    whole = {k: t.untyped_storage().nbytes() == size[k] for k, t in state.items()}
    return with_metadata(state, {k: t if whole[k] else t.clone() for k, t in state.items()})


def _safetensors_bytes(state: State, meta: dict) -> bytes:
    from safetensors.torch import save

    # The format has neither shared memory nor strides: tied tensors are written once for each name.
    contiguous = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    about = {key: meta[key] for key in ('mmema', 'dataset_meta', 'cfg') if meta.get(key)}
    text = json.dumps(about, default=str)
    return save(contiguous, metadata={'format': 'pt', 'mmema': text})
