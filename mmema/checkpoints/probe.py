"""Structure of a checkpoint file: whether it is whole, and its top-level keys.

Nothing in a probed file is imported or called. ``torch.load(weights_only=True)`` would not do:
before torch 2.6 it refuses MMEngine's files, and could run code (CVE-2025-32434).
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

from torch.serialization import MAGIC_NUMBER

from .folders import REST, is_folder

# Bytes of a number in each class of storage that torch's older format names.
_SIZES = {
    **dict.fromkeys(('Byte', 'Char', 'Bool', 'QInt8', 'QUInt8', 'Untyped'), 1),
    **dict.fromkeys(('Short', 'Half', 'BFloat16'), 2),
    **dict.fromkeys(('Int', 'Float', 'QInt32'), 4),
    **dict.fromkeys(('Long', 'Double', 'ComplexFloat'), 8),
    'ComplexDouble': 16,
}


def is_whole(file: str | Path) -> bool:
    """Return whether a checkpoint was written to its end.

    MMEngine writes the file in place, so a process that is killed meanwhile leaves a part of it. A
    zip file, torch's format since 1.6, ends with its table of contents. A file of the older format
    ends with the numbers of all tensors, whose count stands before them. A folder of a sharded run
    gets its name when it is whole.
    """
    if Path(file).is_dir():
        return is_folder(file)
    if zipfile.is_zipfile(file):
        return True
    try:
        with open(file, 'rb') as opened:
            content = _open_older_format(opened)
            content.load()
            keys = _StructureUnpickler(opened).load()
            end = opened.tell() + sum(8 + content.storages[key] for key in keys)
            return os.fstat(opened.fileno()).st_size >= end
    except Exception:  # damaged pickles raise errors of any kind
        return False


def checkpoint_files(folder: str | Path) -> list[Path]:
    """Return the checkpoints in a folder, in the order of their names, whole or not.

    ``filename_tmpl`` of MMEngine's CheckpointHook gives them any name, so files are known by how
    torch begins them, in its older format, too.
    """
    begins = (b'PK\x03\x04', b'\x80\x02')
    folder, found = Path(folder), []
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.suffix == '.part':  # not finished
            continue
        if path.suffix == '.pth' or path.is_dir() and is_folder(path):
            found.append(path)
        elif path.is_file():
            with path.open('rb') as file:
                if file.read(4).startswith(begins):
                    found.append(path)
    return found


def top_level_keys(file: str | Path) -> set:
    """Return the keys of the dict in a checkpoint; none if the file cannot be read."""
    return set(structure(file))


def structure(file: str | Path) -> dict:
    """Return the dict in a checkpoint without its tensors; empty if the file cannot be read."""
    if Path(file).is_dir():
        return structure(Path(file, REST)).get('content', {})
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                name = next(name for name in archive.namelist() if name.endswith('/data.pkl'))
                content = _StructureUnpickler(io.BytesIO(archive.read(name))).load()
        else:
            with open(file, 'rb') as opened:
                content = _open_older_format(opened).load()
        return content if isinstance(content, dict) else {}
    except Exception:  # damaged pickles raise errors of any kind
        return {}


def _open_older_format(file) -> _StructureUnpickler:
    """Return the unpickler of the content, which follows three pickles about the format."""
    magic, _, _ = (_StructureUnpickler(file).load() for _ in range(3))
    if magic != MAGIC_NUMBER:
        raise pickle.UnpicklingError('no file of torch.save')
    return _StructureUnpickler(file)


class _Placeholder:
    """Stand-in for an object of any class, which ignores its arguments and its state."""

    def __init__(self, *args, **kwargs):
        pass

    __setstate__ = __setitem__ = append = extend = __init__


class _StructureUnpickler(pickle.Unpickler):
    """Unpickler of dicts, lists, numbers and text, with placeholders for everything else.

    Attributes:
        storages: Size in bytes of each storage of torch's older format, by its key.
    """

    def __init__(self, file):
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module, name):
        if (module, name) == ('collections', 'OrderedDict'):
            return OrderedDict
        return type(name, (_Placeholder,), {})

    def persistent_load(self, reference):
        if reference[0] == 'storage':
            _, kind, key, _, numbers = reference[:5]
            size = _SIZES.get(kind.__name__.replace('Storage', ''))
            self.storages.setdefault(key, size and size * numbers)
        return _Placeholder()
