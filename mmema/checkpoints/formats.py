"""Formats of checkpoints: where each training code keeps average, raw weights and counter."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Dict

import torch
from torch import Tensor, nn

State = Dict[str, Tensor]


class CheckpointError(ValueError):
    """Refusal of a file, in one line that says why and what to do."""


@dataclass
class Weights:
    """Weights and counter in a checkpoint, in one form for all formats.

    Attributes:
        kind: Name of the format.
        maker: Training code that wrote the file, for people.
        average: The averaged tensors by name, or None.
        raw: The raw tensors by name, or None.
        average_at: Where in the file the averaged ones are.
        raw_at: Where in the file the raw ones are.
        steps: Updates of the average, or None if the file does not say.
        live: Tensors that only restartable averages have: ``schedule``, ``momentum``, ``restarts``.
        meta: The ``meta`` of an MMEngine checkpoint.
        notes: Remarks for people, a line each.
    """

    kind: str
    maker: str
    average: State | None = None
    raw: State | None = None
    average_at: str = ''
    raw_at: str = ''
    steps: int | None = None
    live: dict = field(default_factory=dict)
    meta: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, which: str, state, place: str) -> None:
        """Set the 'average' or the 'raw' weights to the tensors at a place; None leaves them."""
        if state is not None:
            setattr(self, which, _tensors(state, place))
            setattr(self, f'{which}_at', place)


# --- MMEngine and mmema ------------------------------------------------------------------------


def _is_mmengine(content: dict) -> bool:
    return 'state_dict' in content and ('meta' in content or 'ema_state_dict' in content)


def _read_mmengine(content: dict) -> Weights:
    """Read a run's checkpoint: the average in ``state_dict``, raw weights in ``ema_state_dict``."""
    state, meta = _tensors(content['state_dict'], 'state_dict'), _dict_at(content, 'meta')
    found = Weights('mmengine', _mmengine_maker(meta), meta=meta)
    if 'ema_state_dict' not in content:
        return _mmengine_without_ema(found, state, meta)
    ema = content['ema_state_dict']
    swapped = _module_of(ema, 'ema_state_dict')
    missing = sorted(set(state) - set(swapped))
    if missing:
        found.notes.append(
            f'ema_state_dict lacks {len(missing)} of {len(state)} tensors, such as {missing[0]!r}: '
            'for these the two are the same'
        )
    found.set('average', state, 'state_dict')
    found.raw = _with_metadata(state, {name: swapped.get(name, state[name]) for name in state})
    found.raw_at = "ema_state_dict['module.*']"
    found.steps = _counter(ema, 'steps')
    if found.steps is None:
        found.notes.append('ema_state_dict lacks `steps`: a run cannot be resumed from it')
    found.live = _live_values(ema)
    found.kind = 'mmema' if found.live else 'mmengine'
    return found


def _live_values(ema: dict) -> dict:
    """Return the schedule, live values and restarts of a restartable average; else nothing."""
    if 'restarts' not in ema:
        return {}
    live = {k: v for k, v in ema.items() if k != 'steps' and not str(k).startswith('module.')}
    return _tensors(live, 'the EMA state')


def _mmengine_without_ema(found: Weights, state: State, meta: dict) -> Weights:
    exported = _dict_at(meta, 'mmema')
    if exported:
        averaged, note = exported.get('weights') == 'ema', 'exported by mmema'
    elif 'EMAHook' in str(meta.get('cfg', '')):
        averaged = True
        note = 'no ema_state_dict, but the config has an EMAHook: these are its EMA weights'
    else:
        averaged, note = False, 'a run without EMAHook'
    found.set('average' if averaged else 'raw', state, 'state_dict')
    found.steps = _counter(exported, 'steps') if averaged else None
    found.notes.append(note)
    return found


def _mmengine_maker(meta: dict) -> str:
    config = str(meta.get('cfg', ''))
    # The hash of the checkout that the run was started in follows the version.
    version = re.sub(r'([0-9a-f]{40}|unknown)$', '', str(meta.get('mmengine_version', '')))
    maker = f'MMEngine {version}'.rstrip()
    scope = re.search(r"default_scope\s*=\s*'(\w+)'", config)
    ema_type = re.search(r"ema_type\s*=\s*'([\w.]+)'", config)
    maker += f', scope {scope.group(1)}' if scope else ''
    return maker + (f', ema_type {ema_type.group(1)}' if ema_type else '')


def _is_ema_state(content: dict) -> bool:
    return 'steps' in content and any(str(key).startswith('module.') for key in content)


def _read_ema_state(content: dict) -> Weights:
    """Read the bare state of an averaged model of MMEngine, MMDetection, MMYOLO or mmema."""
    live = _live_values(content)
    return Weights(
        'mmema' if live else 'mmengine',
        f'{"mmema" if live else "MMEngine, MMDetection or MMYOLO"}: state of an averaged model',
        average=_module_of(content, 'the file'),
        average_at="'module.*'",
        steps=_counter(content, 'steps'),
        live=live,
    )


# --- YOLOv5, YOLOX -----------------------------------------------------------------------------


def _is_yolov5(content: dict) -> bool:
    return 'model' in content and 'ema' in content and not _is_dfine(content)


def _read_yolov5(content: dict) -> Weights:
    """Read ``model`` and ``ema``; after YOLOv5's ``strip_optimizer`` the EMA is in ``model``."""
    found = Weights('yolov5', 'YOLOv5 or another code of Ultralytics')
    if content['ema'] is None:
        found.set('average', content['model'], 'model')
        found.notes.append('`ema` is empty: the optimizer was stripped, and `model` has the EMA')
    else:
        found.set('average', content['ema'], 'ema')
        found.set('raw', content['model'], 'model')
    found.steps = _counter(content, 'updates')
    return found


def _is_yolox(content: dict) -> bool:
    return 'model' in content and 'start_epoch' in content


def _read_yolox(content: dict) -> Weights:
    """Read the average in ``model``; YOLOX saves neither the raw weights nor the counter."""
    found = Weights('yolox', 'YOLOX')
    found.set('average', content['model'], 'model')
    found.notes.append(
        f'YOLOX takes {content["start_epoch"]} epochs times the iterations of one for the number '
        'of updates when it resumes'
    )
    return found


# --- RT-DETR, D-FINE, DEIM ---------------------------------------------------------------------


def _is_dfine(content: dict) -> bool:
    ema = content.get('ema')
    return (isinstance(ema, dict) and isinstance(ema.get('module'), dict)) or (
        'model' in content and 'last_epoch' in content
    )


def _read_dfine(content: dict) -> Weights:
    """Read ``module`` and ``updates`` in ``ema``, and the raw weights in ``model``."""
    found, ema = Weights('dfine', 'RT-DETR, D-FINE or DEIM'), content.get('ema')
    if ema is not None:
        if not isinstance(ema, dict) or 'module' not in ema:
            raise CheckpointError("ema must be a dict with 'module' in it")
        found.set('average', ema['module'], "ema['module']")
        found.steps = _counter(ema, 'updates')
    found.set('raw', content.get('model'), 'model')
    return found


# --- timm, torch, torchvision ------------------------------------------------------------------


def _is_timm(content: dict) -> bool:
    return 'state_dict' in content and ('state_dict_ema' in content or 'arch' in content)


def _read_timm(content: dict) -> Weights:
    """Read ``state_dict`` and ``state_dict_ema``; timm does not save the counter."""
    found = Weights('timm', f'timm, {content.get("arch", "unknown model")}')
    found.set('average', content.get('state_dict_ema'), 'state_dict_ema')
    found.set('raw', content['state_dict'], 'state_dict')
    _note_decay(found, content.get('args'))
    return found


def _note_decay(found: Weights, args) -> None:
    decay = getattr(args, 'model_ema_decay', None)
    if decay is not None and found.average is not None:
        found.notes.append(f'model_ema_decay was {decay:g}; see docs/migration.md')


def _is_torchvision(content: dict) -> bool:
    return isinstance(content.get('model_ema'), dict) and 'n_averaged' in content['model_ema']


def _read_torchvision(content: dict) -> Weights:
    """Read ``model`` and ``model_ema``, the state of torch's AveragedModel."""
    found = _read_averaged_model(content['model_ema'])
    found.kind, found.maker = 'torchvision', 'torchvision reference'
    found.average_at = "model_ema['module.*']"
    found.set('raw', content.get('model'), 'model')
    _note_decay(found, content.get('args'))
    return found


def _is_averaged_model(content: dict) -> bool:
    return 'n_averaged' in content and any(str(key).startswith('module.') for key in content)


def _read_averaged_model(content: dict) -> Weights:
    """Read ``module.*`` and ``n_averaged``."""
    return Weights(
        'averaged_model',
        'torch.optim.swa_utils.AveragedModel',
        average=_module_of(content, 'the file'),
        average_at="'module.*'",
        steps=_counter(content, 'n_averaged'),
    )


# --- anything else -----------------------------------------------------------------------------


def _is_state_dict(content: dict) -> bool:
    state = content.get(_bare_at(content), content)
    if not isinstance(state, dict):
        return False
    return bool(state) and all(isinstance(value, Tensor) for value in state.values())


def _bare_at(content: dict) -> str:
    return next((key for key in ('state_dict', 'model') if key in content), 'the file')


def _read_state_dict(content: dict) -> Weights:
    """Read a bare state_dict, which does not say which weights it has."""
    found, place = Weights('state_dict', 'unknown: a bare state_dict'), _bare_at(content)
    found.set('raw', content.get(place, content), place)
    found.notes.append('nothing in the file says whether these are averaged or raw weights')
    return found


# (test, reader) of each format; the first whose test is true reads the file.
FORMATS = (
    (_is_mmengine, _read_mmengine),
    (_is_ema_state, _read_ema_state),
    (_is_dfine, _read_dfine),
    (_is_yolov5, _read_yolov5),
    (_is_yolox, _read_yolox),
    (_is_timm, _read_timm),
    (_is_torchvision, _read_torchvision),
    (_is_averaged_model, _read_averaged_model),
    (_is_state_dict, _read_state_dict),
)


def read_weights(content) -> Weights:
    """Recognize the format of a checkpoint's content and read it.

    Raises:
        CheckpointError: If the content is damaged or in no known format.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f'it holds a {type(content).__name__}, and a checkpoint is a dict')
    for recognizes, read in FORMATS:
        if recognizes(content):
            found = read(content)
            if found.average is None and found.raw is None:
                raise CheckpointError(f'it is a file of {found.maker} without any weights')
            return found
    if 'shadow_params' in content:
        raise CheckpointError(
            'it is the state of an EMA of diffusers or pytorch_ema, which keeps a list of tensors '
            'without names; save the state_dict of the model after its copy_to()'
        )
    keys = ', '.join(map(repr, list(content)[:6])) or 'nothing'
    raise CheckpointError(f'it is in no format that mmema knows; it holds {keys}')


def _tensors(state, place: str) -> State:
    """Return names and tensors, without the prefixes that wrappers of a model add."""
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if not isinstance(state, dict):
        raise CheckpointError(f'{place} must be names and tensors, got a {type(state).__name__}')
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f'{place} must be names and tensors, but {name!r} is a {type(value).__name__}'
            )
        _check_is_dense(name, value, place)
    names = [name.replace('_orig_mod.', '') for name in state]
    if names and all(name.startswith('module.') for name in names):
        names = [name[len('module.') :] for name in names]
    return _with_metadata(state, dict(zip(names, state.values())))


def _check_is_dense(name: str, tensor: Tensor, place: str) -> None:
    """Refuse tensors that can be neither compared nor written as numbers in memory."""
    if tensor.is_meta:
        what = 'has no data: it was saved from the meta device'
    elif tensor.is_quantized or 'float4' in str(tensor.dtype):
        what = f'is quantized ({str(tensor.dtype)[6:]}): use the checkpoint before quantization'
    elif tensor.is_nested or tensor.layout != torch.strided:
        what = 'is sparse or nested: save it with .to_dense() or .to_padded_tensor()'
    else:
        return
    raise CheckpointError(f'{place}: {name!r} {what}')


def _module_of(state, place: str) -> State:
    """Return the tensors under ``module.`` in the state of an averaged model."""
    if not isinstance(state, dict):
        raise CheckpointError(f'{place} must be names and tensors, got a {type(state).__name__}')
    inner = {str(k)[7:]: v for k, v in state.items() if str(k).startswith('module.')}
    return _with_metadata(state, _tensors(inner, place))


def _with_metadata(old: State, new: State) -> State:
    """Return ``new`` with the layers' versions, which torch keeps beside a state_dict."""
    kept = OrderedDict(new)
    if hasattr(old, '_metadata'):
        kept._metadata = old._metadata
    return kept


def _dict_at(content: dict, key: str) -> dict:
    value = content.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f'{key} must be a dict, got {value!r:.60}')
    return value


def _counter(content: dict, key: str) -> int | None:
    value = content.get(key)
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(f'{key} must be a number, got {value!r}') from None
