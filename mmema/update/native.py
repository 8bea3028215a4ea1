"""Compiled part: staleness check, blend and copy in main memory, built where a user asked for it.

``python -m mmema.build_native`` compiles ``native.cpp`` into the user's cache folder. Without it
the same is done in Python, with the same results; an update takes longer then.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
import warnings
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

NAME = 'mmema_native'
SOURCE = Path(__file__).with_suffix('.cpp')
# OpenMP is what torch's own threads are on Linux; its library is loaded with torch's.
FLAGS = ['-O2', '-fopenmp'] if sys.platform == 'linux' else ['-O2']


def library() -> Path:
    """Return where the library for this source, Python, torch and processor is, or would be."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmema'
    source = hashlib.sha256(SOURCE.read_bytes() + repr(FLAGS).encode()).hexdigest()[:12]
    python = sysconfig.get_config_var('EXT_SUFFIX').split('.')[1]  # with system and processor
    return cache / f'native-{source}-{python}-torch-{torch.__version__}' / f'{NAME}.so'


def compiled_part():
    """Return the compiled module, or None where there is none."""
    if os.environ.get('MMEMA_NATIVE') == '0':
        return None
    try:
        file = library()
        if not file.is_file():
            return None
        spec = spec_from_file_location(NAME, file)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError, RuntimeError) as error:  # no home folder, or a broken file
        warnings.warn(
            f'mmema goes on in Python: its compiled part cannot be loaded ({error}). Compile it '
            'anew with `python -m mmema.build_native`.',
            stacklevel=2,
        )
        return None
    return module


compiled = compiled_part()
