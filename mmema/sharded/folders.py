"""Writing of checkpoints: one file of rank 0, or a folder to which each rank writes its parts.

The format of a folder is told in :mod:`mmema.checkpoints.folders`, which reads it.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Callable

import torch
from mmengine.dist import is_main_process
from mmengine.runner.checkpoint import save_checkpoint

from ..checkpoints.folders import REST, key_of
from .states import mapped


def write_folder(content: dict, folder: str | Path, is_sharded: Callable, group) -> Future:
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
    tensors = {key_of(place): tensor for place, tensor in sharded.items()}
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


def write_file(checkpoint: dict, filename: str) -> None:
    """Write a checkpoint: beside its place, then move it there. MMEngine writes it in place."""
    if '://' in filename:
        save_checkpoint(checkpoint, filename)
        return
    path = Path(filename)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'.{path.name}.part')
    torch.save(checkpoint, part)
    put(part, path)


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
