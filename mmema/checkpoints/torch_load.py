"""Classes that ``torch.load(weights_only=True)`` may read."""

from __future__ import annotations

from pickle import UnpicklingError

import mmengine.runner.checkpoint
import numpy as np
import torch
from mmengine.logging import HistoryBuffer

# The list as such is older, but takes no names, without which nothing can stand in for getattr.
HAS_ALLOW_LIST = torch.__version__ >= (2, 6)


def allow_mmengine_classes() -> None:
    """Allow-list the classes in MMEngine's checkpoints for ``torch.load(weights_only=True)``.

    That is torch's default since 2.6. MMEngine 0.10.7 neither expects it nor turns it off, so
    resuming and testing fail on the scalars which its message hub keeps in every checkpoint: a
    HistoryBuffer, made of two arrays and of references to its own methods. Naming just these opens
    MMEngine's files; switching the check off, the usual advice, would let any downloaded file run
    its code. Before torch 2.6 there is no such list, and the check is not the default.

    The maintained fork, onedl-mmengine, allows more while it loads (getattr on any object), takes
    all of that off the list afterwards, and reads a file that is refused without the check. With
    this list neither is needed, so there files are read as MMEngine 0.10.7 reads them: by
    ``torch.load`` with its default.
    """
    if not HAS_ALLOW_LIST:
        return
    array = np.empty(0).__reduce__()[0]  # numpy's private function, named otherwise before 2.0
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in ('f8', 'f4', 'i8', 'i4', '?')}
    classes = [HistoryBuffer, np.ndarray, np.dtype, *dtypes]
    torch.serialization.add_safe_globals(
        [
            (_method_of_history_buffer, 'builtins.getattr'),
            # With their names, although these are their own: torch.serialization.safe_globals([X])
            # takes a bare X off the list at its end, whoever has put it there.
            *((cls, f'{cls.__module__}.{cls.__name__}') for cls in classes),
            *((array, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
            *((scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
        ]
    )
    if hasattr(mmengine.runner.checkpoint, '_safe_torch_load'):
        mmengine.runner.checkpoint._safe_torch_load = torch.load


def _method_of_history_buffer(owner, name):
    # Stands in for getattr, which a hostile file could use for more than this.
    if owner is not HistoryBuffer or name.startswith('_'):
        raise UnpicklingError(f'refusing to read attribute {name!r} of {owner!r} from a checkpoint')
    return getattr(owner, name)
