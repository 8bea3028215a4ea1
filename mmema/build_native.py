"""Compile the inner part of an update; see ``native.py``.

    python -m mmema.build_native

It takes less than a minute, once for each Python and torch, and needs a C++ compiler and ninja
(``pip install ninja``). The result lies in the user's cache folder.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import load

from .update.native import FLAGS, NAME, SOURCE, library


def build() -> Path:
    """Compile the library unless it is there; return its file, which is whole or not there."""
    file = library()
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    # The ninja that pip installs stands beside Python, which need not be on the path.
    os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        load(NAME, [str(SOURCE)], build_directory=folder, extra_cflags=FLAGS)
        os.replace(Path(folder) / f'{NAME}.so', file)
    return file


if __name__ == '__main__':
    print(f'compiled: {build()}')
