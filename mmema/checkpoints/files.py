"""Files of checkpoints: read without running code in them, written whole or not at all."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import warnings
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from typing import Callable

import torch

from .formats import CheckpointError, Weights, read_weights

HAS_ALLOW_LIST = hasattr(torch.serialization, 'safe_globals')  # since torch 2.5


def load(path: str | Path, trust: bool = False) -> Weights:
    """Read a checkpoint of MMEngine or of another training code on the CPU.

    It is read with ``weights_only=True``, so no code in the file is run.

    Args:
        path: A file of ``torch.save``, or a ``.safetensors`` file.
        trust: Whether the file may hold any object, as YOLOv5's do. Reading such a file can run
            code that is in it. Defaults to False.

    Returns:
        The content; see :class:`mmema.checkpoints.formats.Weights`.

    Raises:
        CheckpointError: If it is no such file, or damaged, or needs ``trust``.
    """
    path = Path(path)
    _check_is_file(path)
    try:
        if path.suffix == '.safetensors':
            return _read_safetensors(path)
        return read_weights(_read_pickle(path, trust))
    except CheckpointError as error:
        raise CheckpointError(f'{path}: {error}') from error


def _check_is_file(path: Path) -> None:
    """Refuse a path that cannot be read as a file, with its reason."""
    if path.is_dir():
        raise CheckpointError(f'{path} is a folder; name a file in it')
    if not path.exists():
        raise CheckpointError(f'{path} does not exist (seen from {Path.cwd()})')
    if not path.is_file():
        raise CheckpointError(f'{path} is no ordinary file')
    if path.stat().st_size == 0:
        raise CheckpointError(f'{path} is empty (0 bytes): the program that wrote it was stopped')


def _read_pickle(path: Path, trust: bool):
    try:
        with _namespaces_allowed(), warnings.catch_warnings():
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
                f'code that is in the file. If you trust it: trust=True{_on_old_torch()}'
            ) from error
        size = path.stat().st_size
        raise CheckpointError(
            f'it is damaged, cut short or no checkpoint at all ({size} bytes; '
            f'{type(error).__name__}: {text[:80]})'
        ) from error


def _on_old_torch() -> str:
    if HAS_ALLOW_LIST:
        return ''
    return f' (torch {torch.__version__} says so of all files of MMEngine, 2.5 and later do not)'


def _namespaces_allowed():
    """Return a context in which torch reads argparse.Namespace, where timm keeps its arguments."""
    if not HAS_ALLOW_LIST:
        return nullcontext()
    return torch.serialization.safe_globals([argparse.Namespace])


def _read_safetensors(path: Path) -> Weights:
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
    """Return the package of that name, which only ``.safetensors`` files need."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise CheckpointError('.safetensors needs a package: pip install safetensors') from None
    return safetensors


def check_output(out: Path, suffixes: tuple, may_exist: bool) -> None:
    """Refuse a path for a new file with a wrong suffix, without a folder, or taken already."""
    if out.is_dir():
        raise CheckpointError(f'{out} is a folder; name a file in it')
    if out.suffix not in suffixes:
        raise CheckpointError(f'the new file must end in {" or ".join(suffixes)}, got {out.name}')
    if not out.parent.is_dir():
        raise CheckpointError(f'there is no folder {out.parent} for the new file')
    if out.exists() and not may_exist:
        raise CheckpointError(f'{out} exists; force=True replaces it')


def write_whole(out: Path, write: Callable, force: bool, named_by_hash: bool) -> Path:
    """Write a file beside its place and move it there when it is complete."""
    partial = out.with_name(f'.{out.name}.{os.getpid()}.part')
    try:
        with open(partial, 'wb') as file:
            write(file)
        if named_by_hash:
            digest = hashlib.sha256(partial.read_bytes()).hexdigest()
            out = out.with_name(f'{out.stem}-{digest[:8]}{out.suffix}')
            check_output(out, (out.suffix,), force)
        os.replace(partial, out)
    except (OSError, RuntimeError) as error:  # torch gives RuntimeError for a full disk
        raise CheckpointError(f'{out} cannot be written: {error}') from error
    finally:
        if partial.exists():
            partial.unlink()
    return out
