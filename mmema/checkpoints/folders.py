"""Checkpoints in folders: each rank writes its part of every tensor that is sharded.

A folder holds the parts in the format of ``torch.distributed.checkpoint``, by the tensors' places
joined with dots, and ``rest.pth``: the content of the usual file with None in those places.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import Callable

import torch
from mmengine.dist import is_main_process
from torch import Tensor

REST = 'rest.pth'
_ALLOWED = {
    'torch': ('Size',),
    'torch.serialization': ('_get_layout',),
    'torch.distributed.checkpoint.filesystem': ('_StorageInfo',),
    'torch.distributed.checkpoint.metadata': (
        *('Metadata', 'StorageMeta', 'MetadataIndex', 'TensorProperties', '_MEM_FORMAT_ENCODING'),
        *('TensorStorageMetadata', 'ChunkStorageMetadata', 'BytesStorageMetadata'),
    ),
    **dict.fromkeys(('pathlib', 'pathlib._local'), ('PosixPath', 'WindowsPath')),
}


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a checkpoint that :func:`write` has written."""
    return Path(path, REST).is_file() and Path(path, '.metadata').is_file()


def zero_file(path: str | Path) -> Path | None:
    """Return the file of a folder of DeepSpeed's ZeRO-1 or 2 with all but the optimizer.

    None if the path is no such folder.
    """
    file = Path(path, 'mp_rank_00_model_states.pt')
    return file if file.is_file() else None


def write(content: dict, folder: str | Path, is_sharded: Callable, group) -> Future:
    """Write a checkpoint into a folder while the program goes on; every rank takes part.

    The numbers are copied first, so they may change when this returns. The folder gets its name
    when it is whole.

    Args:
        content: What is saved.
        folder: The new folder; one of that name, or a file, is replaced.
        is_sharded: Returns whether a value is a DTensor.
        group: Process group on the CPU that nothing else uses meanwhile.

    Returns:
        The end of the writing on this rank.
    """
    from torch.distributed.checkpoint import async_save

    folder = Path(folder)
    unfinished = folder.with_name(f'.{folder.name}.parts')
    sharded: dict = {}

    def without_parts(value, place: tuple):
        if is_sharded(value):
            sharded[place] = value
            return None
        return value

    rest = mapped(content, without_parts)
    if is_main_process():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        torch.save({'content': rest, 'places': [*sharded]}, unfinished / REST)
    torch.distributed.barrier(group)
    tensors = {_key(place): tensor for place, tensor in sharded.items()}
    assert len(tensors) == len(sharded), 'two places have one key'
    saved = async_save(tensors, checkpoint_id=unfinished, process_group=group)
    finished: Future = Future()

    def finish(saved: Future) -> None:
        try:
            saved.result()
            if is_main_process():
                put(unfinished, folder)
            finished.set_result(None)
        except BaseException as error:
            finished.set_exception(error)

    saved.add_done_callback(finish)
    return finished


def read(folder: str | Path, target_of: Callable | None = None) -> dict:
    """Read a checkpoint from a folder; no code in it is run.

    Args:
        folder: The folder.
        target_of: Called with place, shape and dtype of each sharded tensor; returns the tensor to
            read it into, a DTensor for this rank's part, or None to leave it out. Defaults to
            whole tensors.
    """
    from torch.distributed.checkpoint import load

    saved = torch.load(Path(folder, REST), map_location='cpu', weights_only=True)
    reader, tensors = _reader(folder), {}
    known = reader.read_metadata().state_dict_metadata
    places = {tuple(place): known[_key(place)] for place in saved['places']}
    for place, about in places.items():
        target = (target_of or _whole)(place, about.size, about.properties.dtype)
        if target is not None:
            tensors[_key(place)] = target
    alone = target_of is None or not torch.distributed.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*in a single process')
        load(tensors, storage_reader=reader, no_dist=alone)
    content = saved['content']
    for place in places:
        *path, last = place
        inside = content
        for key in path:
            inside = inside[key]
        inside[last] = tensors.get(_key(place))
    return content


def mapped(content, change: Callable, place: tuple = ()):
    """Return a copy of nested dicts, lists and tuples with each value inside of them changed.

    Args:
        content: The content of a checkpoint.
        change: Called with a value and its place, a tuple of keys; returns the new value.
        place: The place of the content itself. Defaults to that of the whole checkpoint.
    """
    if isinstance(content, dict):
        new = OrderedDict() if isinstance(content, OrderedDict) else {}
        new.update((key, mapped(value, change, (*place, key))) for key, value in content.items())
        if hasattr(content, '_metadata'):  # the state of a module
            new._metadata = content._metadata
        return new
    if type(content) in (list, tuple):
        parts = [mapped(value, change, (*place, i)) for i, value in enumerate(content)]
        return type(content)(parts)
    return change(content, place)


def _key(place) -> str:
    return '.'.join(map(str, place))


def _whole(place: tuple, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def put(new: Path, place: Path) -> None:
    """Move a file or a folder to its place, where another file or folder may be."""
    old = place.with_name(f'.{place.name}.old')
    if place.is_dir() or place.exists() and new.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(place, old)
    os.replace(new, place)
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def _reader(folder: str | Path):
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        """Torch's reader, without the right to call anything that a file names."""

        def read_metadata(self, *args, **kwargs):
            with open(Path(folder, '.metadata'), 'rb') as file:
                metadata = _MetadataUnpickler(file).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(folder)


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler of the table of contents that torch keeps in a folder, and of nothing else."""

    def find_class(self, module, name):
        is_dtype = module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f'refusing to read {module}.{name} from a checkpoint')
        return super().find_class(module, name)
