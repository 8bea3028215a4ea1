"""Files of checkpoints: read without running code in them, written whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Callable, Iterator

import torch

from . import folders
from .formats import CheckpointError, Weights, read_weights
from .torch_load import HAS_ALLOW_LIST


def load(path: str | Path, trust: bool = False) -> Weights:
    """Read a checkpoint of MMEngine or of another training code on the CPU.

    It is read with ``weights_only=True``, so no code in the file is run.

    Args:
        path: A file of ``torch.save``, a ``.safetensors`` file, or a folder that ranks of a sharded
            run, or DeepSpeed's ZeRO-1 or 2, have written.
        trust: Whether the file may hold any object, as YOLOv5's do. Reading such a file can run
            code that is in it. Defaults to False.

    Returns:
        The content; see :class:`mmema.checkpoints.formats.Weights`.

    Raises:
        CheckpointError: If it is no such file, or damaged, or needs ``trust``.
    """
    content = content_of(path, trust)
    with named(path):
        return read_weights(content)


@contextmanager
def named(path: str | Path) -> Iterator[None]:
    """Put the name of a file before the text of a CheckpointError about it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from error


def content_of(path: str | Path, trust: bool = False):
    """Return all that is in a file; see :func:`load` for arguments and errors.

    As for torch, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment means trust in every file.
    """
    trust = trust or os.environ.get('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD') in ('1', 'y', 'yes', 'true')
    path = folders.zero_file(path) or Path(path)
    if not path.is_file() and not folders.is_folder(path):
        raise CheckpointError(f'{path} is no file (seen from {Path.cwd()})')
    with named(path):
        return _content(path, trust)


def _content(path: Path, trust: bool):
    classes = [argparse.Namespace]  # in which timm keeps its arguments
    allowed = torch.serialization.safe_globals(classes) if HAS_ALLOW_LIST else nullcontext()
    try:
        if path.suffix == '.safetensors':
            return _content_of_safetensors(path)
        if path.is_dir():
            return folders.read(path)
        with allowed, warnings.catch_warnings():
            # Else torch's remarks, such as on the protocol of the pickle, stand before our line.
            warnings.simplefilter('ignore', UserWarning)
            return torch.load(path, map_location='cpu', weights_only=not trust)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f'it needs a package that is not at hand ({error}): install it, or run in the folder '
            'of the training code that wrote the file, with PYTHONPATH=.'
        ) from error
    except Exception as error:  # torch raises five kinds for a damaged file, depending on where
        text = ' '.join(str(error).split())
        unknown = re.search(r'(?:GLOBAL|Unsupported class) ([\w.]+)', text)
        if unknown and not trust:
            old = '' if HAS_ALLOW_LIST else ' (before torch 2.6 all files of MMEngine need this)'
            raise CheckpointError(
                f'it holds {unknown.group(1)}, and reading more than tensors and numbers can run '
                f'code that is in the file. If you trust it: --trust (trust=True), or '
                f'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment{old}'
            ) from error
        raise CheckpointError(
            f'it is damaged, cut short or no checkpoint at all ({path.stat().st_size} bytes; '
            f'{type(error).__name__}: {text[:80]})'
        ) from error


def _content_of_safetensors(path: Path) -> dict:
    from safetensors import safe_open

    with safe_open(str(path), framework='pt') as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads((file.metadata() or {}).get('mmema', '{}'))
    return {'state_dict': state, 'meta': meta} if meta else state


def write_whole(
    out: Path, write: Callable, suffixes: tuple, force: bool, named_by_hash: bool = False
) -> Path:
    """Write a file beside its place and move it there when it is complete."""
    if out.suffix not in suffixes:
        raise CheckpointError(f'the new file must end in {" or ".join(suffixes)}, got {out.name}')
    partial = out.with_name(f'.{out.name}.{os.getpid()}.part')
    try:
        with open(partial, 'wb') as file:
            write(file)
        if named_by_hash:
            digest = hashlib.sha256(partial.read_bytes()).hexdigest()
            out = out.with_name(f'{out.stem}-{digest[:8]}{out.suffix}')
        if out.exists() and not force:
            raise CheckpointError(f'{out} exists; --force (force=True) replaces it')
        os.replace(partial, out)
    except (OSError, RuntimeError, ImportError) as error:  # torch: RuntimeError for a full disk
        raise CheckpointError(f'{out} cannot be written: {error}') from error
    finally:
        if partial.exists():
            partial.unlink()
    return out
