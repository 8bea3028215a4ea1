"""Where each training code keeps the average, the raw weights and the counter in its files."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Callable, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

State = Dict[str, Tensor]


class CheckpointError(ValueError):
    """A file that cannot be used, in one line that says why and what to do."""


@dataclass
class Weights:
    """What a checkpoint says of an average, whoever made it.

    Attributes:
        kind: Name of the format, a key of :data:`FORMATS`.
        maker: Who wrote the file, for people.
        average: The averaged tensors by name, or None.
        raw: The raw tensors by name, or None.
        average_at: Where in the file the averaged ones are.
        raw_at: Where in the file the raw ones are.
        steps: Updates of the average, or None if the file does not say.
        live: What else of a mmema state there is: ``momentum``, ``gamma``, ``restarts`` ...
        meta: The ``meta`` of an MMEngine checkpoint.
        notes: What a reader should know, a line each.
    """

    kind: str
    maker: str
    average: Optional[State] = None
    raw: Optional[State] = None
    average_at: str = ''
    raw_at: str = ''
    steps: Optional[int] = None
    live: dict = field(default_factory=dict)
    meta: dict = field(default_factory=dict)
    notes: List[str] = field(default_factory=list)


# --- MMEngine and mmema ------------------------------------------------------------------------


def is_mmengine(content: dict) -> bool:
    return 'state_dict' in content and ('meta' in content or 'ema_state_dict' in content)


def read_mmengine(content: dict) -> Weights:
    """A run's checkpoint: ``state_dict`` has the average, ``ema_state_dict`` the raw weights."""
    state, meta = tensors(content['state_dict'], 'state_dict'), dict_at(content, 'meta')
    found = Weights('mmengine', mmengine_maker(meta), meta=meta)
    if 'ema_state_dict' not in content:
        return mmengine_without_ema(found, state, meta)
    ema = content['ema_state_dict']
    swapped = module_of(ema, 'ema_state_dict')
    missing = sorted(set(state) - set(swapped))
    if missing:
        found.notes.append(
            f'ema_state_dict lacks {len(missing)} of {len(state)} tensors, such as {missing[0]!r}: '
            'for these the two are the same'
        )
    found.average, found.average_at = state, 'state_dict'
    found.raw = with_metadata(state, {name: swapped.get(name, state[name]) for name in state})
    found.raw_at = "ema_state_dict['module.*']"
    found.steps = counter(ema, 'steps')
    if found.steps is None:
        found.notes.append('ema_state_dict lacks `steps`: a run cannot be resumed from it')
    found.live = live_values(ema)
    found.kind = 'mmema' if found.live else 'mmengine'
    return found


def live_values(ema: dict) -> dict:
    """Return what a mmema class adds to the state of an average, nothing for other classes."""
    if 'restarts' not in ema:
        return {}
    return {k: v for k, v in ema.items() if k != 'steps' and not k.startswith('module.')}


def mmengine_without_ema(found: Weights, state: State, meta: dict) -> Weights:
    own = dict_at(meta, 'mmema')
    ema = own.get('weights') == 'ema' if 'weights' in own else 'EMAHook' in str(meta.get('cfg', ''))
    if ema:
        found.average, found.average_at = state, 'state_dict'
        found.steps = counter(own, 'steps')
        found.notes.append(
            'made by `export --weights ema`'
            if own
            else 'no ema_state_dict, but the config has an EMAHook: these are its EMA weights'
        )
    else:
        found.raw, found.raw_at = state, 'state_dict'
        found.notes.append('made by `export --weights raw`' if own else 'a run without EMAHook')
    return found


def mmengine_maker(meta: dict) -> str:
    config = str(meta.get('cfg', ''))
    # The version is followed by the hash of whatever checkout the run was started in.
    version = re.sub(r'([0-9a-f]{40}|unknown)$', '', str(meta.get('mmengine_version', '')))
    maker = f'MMEngine {version}'.rstrip()
    scope = re.search(r"default_scope\s*=\s*'(\w+)'", config)
    ema_type = re.search(r"ema_type\s*=\s*'([\w.]+)'", config)
    maker += f', scope {scope.group(1)}' if scope else ''
    return maker + (f', ema_type {ema_type.group(1)}' if ema_type else '')


def is_ema_state(content: dict) -> bool:
    return 'steps' in content and any(str(key).startswith('module.') for key in content)


def read_ema_state(content: dict) -> Weights:
    """The state of an averaged model alone, of MMEngine's, MMDetection's, MMYOLO's or mmema's."""
    live = live_values(content)
    return Weights(
        'mmema' if live else 'mmengine',
        f'{"mmema" if live else "MMEngine, MMDetection or MMYOLO"}: state of an averaged model',
        average=module_of(content, 'the file'),
        average_at="'module.*'",
        steps=counter(content, 'steps'),
        live=live,
    )


def write_mmengine(weights: Weights) -> dict:
    return mmengine_checkpoint(weights, {})


def write_mmema(weights: Weights) -> dict:
    return mmengine_checkpoint(weights, weights.live)


def mmengine_checkpoint(weights: Weights, live: dict) -> dict:
    """A checkpoint that a Runner resumes from at epoch 0, with a new optimizer."""
    average = weights.average if weights.average is not None else weights.raw
    raw = weights.raw if weights.raw is not None else weights.average
    missing = sorted(set(average) ^ set(raw))
    if missing:
        raise CheckpointError(
            f'averaged and raw weights must have the same names, but {len(missing)} differ, such '
            f'as {missing[0]!r}; --rename may help'
        )
    ema = {'steps': torch.tensor(weights.steps), **{f'module.{k}': raw[k] for k in average}}
    return {
        'meta': {**weights.meta, 'epoch': 0, 'iter': 0},
        'state_dict': average,
        'ema_state_dict': OrderedDict({**ema, **live}),
        'message_hub': {'log_scalars': {}, 'runtime_info': {}, 'resumed_keys': {}},
    }


# --- YOLOv5, YOLOX -----------------------------------------------------------------------------


def is_yolov5(content: dict) -> bool:
    return 'model' in content and 'ema' in content and not is_dfine(content)


def read_yolov5(content: dict) -> Weights:
    """``model`` and ``ema``; after its ``strip_optimizer`` the EMA is in ``model``."""
    found = Weights('yolov5', 'YOLOv5 or another code of Ultralytics')
    if content['ema'] is None:
        found.average, found.average_at = tensors(content['model'], 'model'), 'model'
        found.notes.append('`ema` is empty: the optimizer was stripped, and `model` has the EMA')
    else:
        found.average, found.average_at = tensors(content['ema'], 'ema'), 'ema'
        if content['model'] is not None:
            found.raw, found.raw_at = tensors(content['model'], 'model'), 'model'
    found.steps = counter(content, 'updates')
    return found


def write_yolov5(weights: Weights) -> dict:
    return {
        'epoch': -1,
        'best_fitness': None,
        'model': weights.raw,
        'ema': weights.average,
        'updates': weights.steps,
        'optimizer': None,
    }


def is_yolox(content: dict) -> bool:
    return 'model' in content and 'start_epoch' in content


def read_yolox(content: dict) -> Weights:
    """``model`` has the average; the raw weights and the counter are not saved."""
    return Weights(
        'yolox',
        'YOLOX',
        average=tensors(content['model'], 'model'),
        average_at='model',
        notes=[
            f'YOLOX takes {content["start_epoch"]} epochs times the iterations of one for the '
            'number of updates when it resumes'
        ],
    )


def write_yolox(weights: Weights) -> dict:
    return {'start_epoch': 0, 'model': weights.average, 'optimizer': None}


# --- RT-DETR, D-FINE, DEIM ---------------------------------------------------------------------


def is_dfine(content: dict) -> bool:
    ema = content.get('ema')
    return (isinstance(ema, dict) and isinstance(ema.get('module'), dict)) or (
        'model' in content and 'last_epoch' in content
    )


def read_dfine(content: dict) -> Weights:
    """``ema`` has ``module`` and ``updates``; ``model`` the raw weights."""
    found, ema = Weights('dfine', 'RT-DETR, D-FINE or DEIM'), content.get('ema')
    if ema is not None:
        if not isinstance(ema, dict) or 'module' not in ema:
            raise CheckpointError("ema must be a dict with 'module' in it")
        found.average, found.average_at = tensors(ema['module'], 'ema.module'), "ema['module']"
        found.steps = counter(ema, 'updates')
    if content.get('model') is not None:
        found.raw, found.raw_at = tensors(content['model'], 'model'), 'model'
    return found


def write_dfine(weights: Weights) -> dict:
    return {
        'last_epoch': -1,
        'model': weights.raw,
        'ema': {'module': weights.average, 'updates': weights.steps},
    }


# --- timm, torch, torchvision ------------------------------------------------------------------


def is_timm(content: dict) -> bool:
    return 'state_dict' in content and ('state_dict_ema' in content or 'arch' in content)


def read_timm(content: dict) -> Weights:
    """``state_dict`` and ``state_dict_ema``; the counter is not saved."""
    found = Weights('timm', f'timm, {content.get("arch", "unknown model")}')
    if 'state_dict_ema' in content:
        found.average = tensors(content['state_dict_ema'], 'state_dict_ema')
        found.average_at = 'state_dict_ema'
        note_decay(found, content.get('args'))
    found.raw, found.raw_at = tensors(content['state_dict'], 'state_dict'), 'state_dict'
    return found


def note_decay(found: Weights, args) -> None:
    decay = getattr(args, 'model_ema_decay', None)
    if decay is not None:
        found.notes.append(f'--model-ema-decay was {decay:g}; see docs/migration.md')


def write_timm(weights: Weights) -> dict:
    return {
        'epoch': 0,
        'arch': 'unknown',
        'version': 2,
        'state_dict': weights.raw,
        'state_dict_ema': weights.average,
    }


def is_torchvision(content: dict) -> bool:
    return isinstance(content.get('model_ema'), dict) and 'n_averaged' in content['model_ema']


def read_torchvision(content: dict) -> Weights:
    """``model`` and ``model_ema``, the state of torch's AveragedModel."""
    found = read_averaged_model(content['model_ema'])
    found.kind, found.maker = 'torchvision', 'torchvision reference'
    found.average_at = "model_ema['module.*']"
    if content.get('model') is not None:
        found.raw, found.raw_at = tensors(content['model'], 'model'), 'model'
    note_decay(found, content.get('args'))
    return found


def write_torchvision(weights: Weights) -> dict:
    return {'model': weights.raw, 'model_ema': write_averaged_model(weights)}


def is_averaged_model(content: dict) -> bool:
    return 'n_averaged' in content and any(str(key).startswith('module.') for key in content)


def read_averaged_model(content: dict) -> Weights:
    """``module.*`` and ``n_averaged``."""
    return Weights(
        'averaged_model',
        'torch.optim.swa_utils.AveragedModel',
        average=module_of(content, 'the file'),
        average_at="'module.*'",
        steps=counter(content, 'n_averaged'),
    )


def write_averaged_model(weights: Weights) -> dict:
    named = {f'module.{name}': tensor for name, tensor in weights.average.items()}
    return OrderedDict(n_averaged=torch.tensor(weights.steps), **named)


# --- anything else -----------------------------------------------------------------------------


def is_state_dict(content: dict) -> bool:
    state = content.get(bare_at(content), content)
    if not isinstance(state, dict):
        return False
    return bool(state) and all(isinstance(value, Tensor) for value in state.values())


def bare_at(content: dict) -> str:
    return next((key for key in ('state_dict', 'model') if key in content), 'the file')


def read_state_dict(content: dict) -> Weights:
    """Names and tensors, and nothing that says which weights they are."""
    place = bare_at(content)
    return Weights(
        'state_dict',
        'unknown: a bare state_dict',
        raw=tensors(content.get(place, content), place),
        raw_at=place,
        notes=['nothing in the file says whether these are averaged or raw weights'],
    )


class Format(NamedTuple):
    """How to recognize, read and write the files of one training code."""

    recognizes: Callable[[dict], bool]
    read: Callable[[dict], Weights]
    write: Optional[Callable[[Weights], dict]]
    keeps: frozenset  # of what a Weights has: raw, steps


# The first that recognizes a file reads it.
FORMATS = {
    'mmema': Format(lambda content: False, read_mmengine, write_mmema, frozenset({'raw', 'steps'})),
    'mmengine': Format(is_mmengine, read_mmengine, write_mmengine, frozenset({'raw', 'steps'})),
    'ema_state': Format(is_ema_state, read_ema_state, None, frozenset()),
    'dfine': Format(is_dfine, read_dfine, write_dfine, frozenset({'raw', 'steps'})),
    'yolov5': Format(is_yolov5, read_yolov5, write_yolov5, frozenset({'raw', 'steps'})),
    'yolox': Format(is_yolox, read_yolox, write_yolox, frozenset()),
    'timm': Format(is_timm, read_timm, write_timm, frozenset({'raw'})),
    'torchvision': Format(
        is_torchvision, read_torchvision, write_torchvision, frozenset({'raw', 'steps'})
    ),
    'averaged_model': Format(
        is_averaged_model, read_averaged_model, write_averaged_model, frozenset({'steps'})
    ),
    'state_dict': Format(is_state_dict, read_state_dict, None, frozenset()),
}


def read_weights(content) -> Weights:
    """Find out whose checkpoint this is, and where everything in it is.

    Raises:
        CheckpointError: If it is nobody's that we know.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f'it holds a {type(content).__name__}, and a checkpoint is a dict')
    for known in FORMATS.values():
        if known.recognizes(content):
            return known.read(content)
    if 'shadow_params' in content:
        raise CheckpointError(
            'it is the state of an EMA of diffusers or pytorch_ema, which keeps a list of tensors '
            'without names; save the state_dict of the model after its copy_to()'
        )
    keys = ', '.join(map(repr, list(content)[:6])) or 'nothing'
    raise CheckpointError(f'it is in no format that mmema knows; it holds {keys}')


def tensors(state, place: str) -> State:
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
        check_plain(name, value, place)
    names = [name.replace('_orig_mod.', '') for name in state]
    if names and all(name.startswith('module.') for name in names):
        names = [name[len('module.') :] for name in names]
    return with_metadata(state, dict(zip(names, state.values())))


def check_plain(name: str, tensor: Tensor, place: str) -> None:
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


def module_of(state, place: str) -> State:
    """Return what stands under ``module.`` in the state of an averaged model."""
    if not isinstance(state, dict):
        raise CheckpointError(f'{place} must be names and tensors, got a {type(state).__name__}')
    inner = {str(k)[7:]: v for k, v in state.items() if str(k).startswith('module.')}
    return with_metadata(state, tensors(inner, place))


def with_metadata(old: State, new: State) -> State:
    """Keep what torch notes of the layers' versions beside a state_dict."""
    kept = OrderedDict(new)
    if hasattr(old, '_metadata'):
        kept._metadata = old._metadata
    return kept


def dict_at(content: dict, key: str) -> dict:
    value = content.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f'{key} must be a dict, got {value!r:.60}')
    return value


def counter(content: dict, key: str) -> Optional[int]:
    value = content.get(key)
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError, RuntimeError):
        raise CheckpointError(f'{key} must be a number, got {value!r}') from None
