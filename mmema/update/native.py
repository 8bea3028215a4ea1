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
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from mmengine.registry import DefaultScope

from ..messages import inform

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


def say_how_to_compile() -> None:
    """Write into the log of a run, once, how to get the compiled part, unless it was turned off."""
    in_a_run = DefaultScope.get_current_instance() is not None
    if in_a_run and os.environ.get('MMEMA_NATIVE') != '0':
        _say_once()


@lru_cache(None)
def _say_once():
    inform(
        'mmema updates the average in Python, with the same results and more slowly: '
        '`python -m mmema.build_native` compiles the update, once for this Python and torch.'
    )
