"""Formats of checkpoints: where each training code keeps average, raw weights and counter."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Dict

import torch
from torch import Tensor, nn

from ..averaged import EXTRA_STATE
from ..messages import listed
from ..record import Record

State = Dict[str, Tensor]

# Maker, marks, and the places of average, raw weights and counter (None: not saved). A file with
# all places of one mark is the maker's; the first row that fits is used. A place is a key or a key
# in a dict; `module.*` stands for all names with that prefix, as in an averaged model's state.
FORMATS = (
    ('averaged model of MMEngine or mmema', [{'module.*', 'steps'}], ('module.*', None, 'steps')),
    (
        'RT-DETR, D-FINE or DEIM',
        [{"ema['module']"}, {'model', 'last_epoch'}],
        ("ema['module']", 'model', "ema['updates']"),
    ),
    ('YOLOv5 or another code of Ultralytics', [{'model', 'ema'}], ('ema', 'model', 'updates')),
    ('YOLOX', [{'model', 'start_epoch'}], ('model', None, None)),
    (
        'timm',
        [{'state_dict', 'state_dict_ema'}, {'state_dict', 'arch'}],
        ('state_dict_ema', 'state_dict', None),
    ),
    (
        'torchvision reference',
        [{"model_ema['n_averaged']"}],
        ("model_ema['module.*']", 'model', "model_ema['n_averaged']"),
    ),
    ('AveragedModel of torch', [{'module.*', 'n_averaged'}], ('module.*', None, 'n_averaged')),
)


class CheckpointError(ValueError):
    """Refusal of a file, in one line that says why and what to do."""


@dataclass
class Weights:
    """Weights and counter in a checkpoint, in one form for all formats."""

    maker: str  # training code that wrote the file, for people
    average: State | None = None
    raw: State | None = None
    average_at: str = ''  # place in the file
    raw_at: str = ''
    steps: int | None = None  # updates of the average; None if the file does not say
    live: dict = field(default_factory=dict)  # beside it in a restartable average's state
    record: Record | None = None  # of its updates
    also: dict[str, Weights] = field(default_factory=dict)  # the other averages of a run, by name
    ladder: dict = field(default_factory=dict)  # the state of the choice among several of them
    meta: dict = field(default_factory=dict)  # of an MMEngine checkpoint
    exported: dict = field(default_factory=dict)  # record of an export, in ``meta``
    notes: list[str] = field(default_factory=list)  # for people, a line each

    def set(self, which: str, state, place: str) -> None:
        """Set the 'average' or the 'raw' weights to the tensors at a place; None leaves them."""
        if state is not None:
            setattr(self, which, _tensors(state, place))
            setattr(self, f'{which}_at', place)

    def sets(self) -> dict[str, State]:
        """Return the sets of weights by name: 'ema', 'raw', and the other averages of a run."""
        also = {name: other.average for name, other in self.also.items()}
        sets = {'ema': self.average, 'raw': self.raw, **also}
        return {name: state for name, state in sets.items() if state is not None}

    def note_missing(self, state: State, whole: State, place: str, result: str) -> bool:
        """Add a note if a state lacks tensors of the whole one; return whether it does."""
        missing = sorted(set(whole) - set(state))
        if missing:
            self.notes.append(
                f'{place} lacks {len(missing)} of {len(whole)} tensors, such as {missing[0]!r}: '
                + result
            )
        return bool(missing)


def read_weights(content) -> Weights:
    """Recognize the format of a checkpoint's content and read it.

    Raises:
        CheckpointError: If the content is damaged or in no known format.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f'it holds a {type(content).__name__}, and a checkpoint is a dict')
    values = _by_place(content)
    if 'state_dict' in content and ('meta' in content or 'ema_state_dict' in content):
        return _read_run(values)
    for maker, marks, places in FORMATS:
        if any(mark <= values.keys() for mark in marks):
            return _read_other(Weights(maker), values, *places)
    return _read_bare(content)


def _by_place(content: dict) -> dict:
    """Return the values of a checkpoint by their places."""
    values = {**content, **_averaged_model(content, 'module.*')}
    for key, value in content.items():
        if isinstance(value, dict):
            values.update({f'{key}[{inner!r}]': inside for inner, inside in value.items()})
            values.update(_averaged_model(value, f"{key}['module.*']"))
    return values


def _averaged_model(state: dict, place: str) -> dict:
    """Return the tensors under ``module.`` by their place; nothing if there are none."""
    inner = {str(k)[7:]: v for k, v in state.items() if str(k).startswith('module.')}
    return {place: with_metadata(state, inner)} if inner else {}


def _read_run(values: dict) -> Weights:
    """Read a run's checkpoint: the average in ``state_dict``, raw weights in ``ema_state_dict``."""
    state, meta = _tensors(values['state_dict'], 'state_dict'), _dict_at(values, 'meta')
    found = Weights(_maker_of_run(meta), meta=meta)
    whole = values['state_dict']
    items = whole.items() if isinstance(whole, dict) else ()
    extra = [name for name, value in items if _is_extra_state(name, value)]
    if extra:
        found.notes.append(f'extra state that is no tensor is left out: {listed(extra)}')
    if 'ema_state_dict' not in values:
        _set_only_weights(found, state)
        return found
    ema = _dict_at(values, 'ema_state_dict')
    found.live, found.record = _live_values(ema), _record(ema)
    swapped = _tensors(values.get("ema_state_dict['module.*']", {}), 'ema_state_dict')
    found.note_missing(swapped, state, 'ema_state_dict', 'for these the two are the same')
    raw = with_metadata(state, {name: swapped.get(name, state[name]) for name in state})
    found.set('average', state, 'state_dict')
    found.set('raw', raw, "ema_state_dict['module.*']")
    found.steps = _counter(values, "ema_state_dict['steps']")
    if found.steps is None:
        found.notes.append('ema_state_dict lacks `steps`: a run cannot be resumed from it')
    found.ladder = _dict_at(values, 'ema_auto')
    for name in _dict_at(values, 'ema_also'):
        _read_also(found, name, values)
    return found


def _read_also(found: Weights, name: str, values: dict) -> None:
    """Read one of the other averages of a run, the state of an averaged model."""
    place = f'ema_also[{name!r}]'
    state = _dict_at(_dict_at(values, place), 'state_dict')
    own = _tensors(_averaged_model(state, 'module.*').get('module.*', {}), place)
    if not found.note_missing(own, found.average, place, 'it is left out'):
        other = Weights(found.maker, steps=_counter(state, 'steps'))
        other.live, other.record = _live_values(state), _record(state)
        other.average = with_metadata(found.average, {key: own[key] for key in found.average})
        found.also[name] = other


def _maker_of_run(meta: dict) -> str:
    config = str(meta.get('cfg', ''))
    # The hash of the checkout that the run was started in follows the version.
    version = re.sub(r'([0-9a-f]{40}|unknown)$', '', str(meta.get('mmengine_version', '')))
    parts = [f'MMEngine {version}'.rstrip()]
    for key, shown in (('default_scope', 'scope'), ('ema_type', 'ema_type')):
        value = re.search(rf"{key}\s*=\s*'([\w.]+)'", config)
        parts += [f'{shown} {value.group(1)}'] if value else []
    return ', '.join(parts)


def _set_only_weights(found: Weights, state: State) -> None:
    """Set the weights of a run's checkpoint that has one set of them."""
    exported = found.exported = _dict_at(found.meta, 'mmema')
    if exported:
        averaged, about = exported.get('weights') != 'raw', {**exported, 'steps': None}
        about = [f'{key} {value}' for key, value in about.items() if value is not None]
        note = f'exported by mmema: {", ".join(about)}'
    elif 'EMAHook' in str(found.meta.get('cfg', '')):
        averaged = True
        note = 'no ema_state_dict, but the config has an EMAHook: these are its EMA weights'
    else:
        averaged, note = False, 'a run without EMAHook'
    found.set('average' if averaged else 'raw', state, 'state_dict')
    found.steps = _counter(exported, 'steps') if averaged else None
    found.notes.append(note)


def _live_values(ema: dict) -> dict:
    """Return the schedule, live values and restarts of a restartable average; else nothing."""
    if 'restarts' not in ema:
        return {}
    apart = ('steps', 'record')
    live = {k: v for k, v in ema.items() if k not in apart and not str(k).startswith('module.')}
    name = live.get('schedule')
    if name is not None and not _is_text(name):
        raise CheckpointError('schedule must be a name in ASCII, in a uint8 tensor')
    return _tensors(live, 'the EMA state')


def _record(ema: dict) -> Record | None:
    """Return the record of an average; None if its class has none."""
    if 'record' not in ema:
        return None
    try:
        return Record.decode(ema['record'])
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def _is_text(value) -> bool:
    is_bytes = isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1
    return is_bytes and bytes(value.tolist()).isascii()


def _read_other(
    found: Weights, values: dict, average: str, raw: str | None, steps: str | None
) -> Weights:
    """Read the weights and the counter at the places of a format."""
    found.steps = _counter(values, steps)
    if steps == 'steps':
        found.live, found.record = _live_values(values), _record(values)
    if 'YOLOv5' in found.maker and values['ema'] is None:
        average, raw = 'model', None
        found.notes.append('`ema` is empty: the optimizer was stripped, and `model` has the EMA')
    if found.maker == 'YOLOX':
        found.notes.append(
            f'YOLOX takes {values["start_epoch"]} epochs times the iterations of one for the '
            'number of updates when it resumes'
        )
    outer = average.split('[')[0]
    if average not in values and values.get(outer) is not None:
        raise CheckpointError(f'{outer} must be a dict, with weights at {average}')
    found.set('average', values.get(average), average)
    found.set('raw', values.get(raw), raw)
    if found.average is None and found.raw is None:
        raise CheckpointError(f'it is a file of {found.maker} without any weights')
    decay = getattr(values.get('args'), 'model_ema_decay', None)
    if decay is not None and found.average is not None:
        found.notes.append(f'model_ema_decay was {decay}; see docs/migration.md')
    return found


def _read_bare(content: dict) -> Weights:
    """Read a bare state_dict, which does not say which weights it has."""
    place = next((key for key in ('state_dict', 'model') if key in content), 'the file')
    state = content.get(place, content)
    if state and isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values()):
        found = Weights('unknown: a bare state_dict')
        found.set('raw', state, place)
        found.notes.append('nothing in the file says whether these are averaged or raw weights')
        return found
    keys = ', '.join(map(repr, list(content)[:6])) or 'nothing'
    raise CheckpointError(f'it is in no format that mmema knows; it holds {keys}')


def _is_extra_state(name, value) -> bool:
    """Return whether a layer keeps something beside its tensors here, and no tensor."""
    return str(name).endswith(EXTRA_STATE) and not isinstance(value, Tensor)


def _tensors(state, place: str) -> State:
    """Return names and tensors, without the prefixes that wrappers of a model add.

    Extra state that is no tensor is left out.
    """
    if isinstance(state, nn.Module):
        state = state.state_dict()
    if not isinstance(state, dict):
        raise CheckpointError(f'{place} must be names and tensors, got a {type(state).__name__}')
    extra = [name for name, value in state.items() if _is_extra_state(name, value)]
    if extra:
        state = with_metadata(state, {n: value for n, value in state.items() if n not in extra})
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f'{place} must be names and tensors, but {name!r} is a {type(value).__name__}'
            )
        if not _is_dense(value):
            raise CheckpointError(
                f'{place}: {name!r} is sparse, nested, quantized or without data (meta device), '
                'and only dense tensors are read'
            )
    names = [name.replace('_orig_mod.', '') for name in state]
    if names and all(name.startswith('module.') for name in names):
        names = [name[len('module.') :] for name in names]
    return with_metadata(state, dict(zip(names, state.values())))


def _is_dense(tensor: Tensor) -> bool:
    odd = tensor.is_meta or tensor.is_quantized or 'float4' in str(tensor.dtype)
    return not odd and not tensor.is_nested and tensor.layout == torch.strided


def with_metadata(old: State, new: State) -> State:
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


def _counter(values: dict, place: str | None) -> int | None:
    value = values.get(place)
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise CheckpointError(f'{place} must be a number, got {value!r}') from None
