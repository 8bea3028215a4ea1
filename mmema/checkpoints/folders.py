"""Checkpoints in folders, to which each rank of a sharded run has written its parts, read.

A folder holds the parts in the format of ``torch.distributed.checkpoint``, by the tensors' places
joined with dots, and ``rest.pth``: the content of the usual file with None in those places.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Callable

import torch
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
    """Return whether a path is a checkpoint that ranks of a sharded run have written."""
    return Path(path, REST).is_file() and Path(path, '.metadata').is_file()


def zero_file(path: str | Path) -> Path | None:
    """Return the file of a folder of DeepSpeed's ZeRO-1 or 2 with all but the optimizer.

    None if the path is no such folder.
    """
    file = Path(path, 'mp_rank_00_model_states.pt')
    return file if file.is_file() else None


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
    places = {tuple(place): known[key_of(place)] for place in saved['places']}
    for place, about in places.items():
        target = (target_of or _whole)(place, about.size, about.properties.dtype)
        if target is not None:
            tensors[key_of(place)] = target
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
        inside[last] = tensors.get(key_of(place))
    return content


def key_of(place) -> str:
    return '.'.join(map(str, place))


def _whole(place: tuple, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


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
