"""Which tensor of the average follows which tensor of the source, and the blend itself."""

from __future__ import annotations

from copy import deepcopy
from gc import get_referents
from operator import attrgetter, is_
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import native

_SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_SMALL = 2**12  # elements; norms and biases of all usual layers
_RUN = 2**15 - 1  # elements up to which torch.cat is one loop; beyond, an operator for each tensor


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside MMDistributedDataParallel and its like, or test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def named_tensors(model: nn.Module) -> Iterator[Tuple[str, Tensor, bool]]:
    """Yield (name, tensor, whether it is a buffer), tied tensors once for each of their names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter, False
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield name, buffer, True


def averaged_copy(model: nn.Module, device: Optional[torch.device]) -> nn.Module:
    """Copy a model so that every tensor is its own, on ``device``, and exists there only once.

    Sixteen-bit tensors become float32: at a momentum of 2e-4 a bf16 or fp16 average would round
    every step away and never move.
    """
    memo = {}
    for name, tensor, is_buffer in named_tensors(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = _own_copy(name, tensor, is_buffer, device)
    _lay_end_to_end([*memo.values()])
    try:
        copied = deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            'the model must be deep-copyable to be averaged, but '
            f'{_first_uncopyable(model, memo)} is not ({error}). Make it a buffer, or detach it.'
        ) from error
    return copied.requires_grad_(False)


def _own_copy(name: str, tensor: Tensor, is_buffer: bool, device: Optional[torch.device]) -> Tensor:
    if is_lazy(tensor):
        raise ValueError(
            f'the model must have all its tensors to be averaged, but {name!r} is lazy and has no '
            'shape yet. Run one forward pass first.'
        )
    if tensor.layout != torch.strided:
        raise ValueError(
            f'the model must have dense tensors to be averaged, but {name!r} is {tensor.layout}. '
            'Make it dense, or an attribute that is no buffer.'
        )
    device = tensor.device if device is None else device
    dtype = torch.float32 if tensor.dtype in _SIXTEEN_BITS else tensor.dtype
    same = (dtype, device) == (tensor.dtype, tensor.device)
    if is_buffer:
        return tensor.detach().clone() if same else tensor.detach().to(device, dtype)
    if same:
        return deepcopy(tensor)  # keeps what a subclass of Parameter adds
    return nn.Parameter(tensor.detach().to(device, dtype), requires_grad=False)


def _lay_end_to_end(tensors: List[Tensor]) -> None:
    """Move the small vectors on the CPU into one storage for each dtype.

    Norms and biases are two thirds of a detector's tensors and half a percent of its weights: as
    slices of one tensor they are blended by a few operators instead of hundreds.
    """
    vectors: Dict[torch.dtype, List[Tensor]] = {}
    for tensor in tensors:
        if _is_small_vector(tensor):
            vectors.setdefault(tensor.dtype, []).append(tensor)
    for group in vectors.values():
        flat = torch.cat([tensor.detach() for tensor in group])
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group])):
            tensor.data = part


def _is_small_vector(tensor: Tensor) -> bool:
    return tensor.dim() == 1 and 0 < tensor.numel() <= _SMALL and tensor.device.type == 'cpu'


def _first_uncopyable(model: nn.Module, memo: dict) -> str:
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ('_parameters', '_buffers', '_modules'):
                continue
            try:
                deepcopy(value, dict(memo))
            except Exception:
                return repr(f'{prefix}.{key}' if prefix else key)
    return 'one of its attributes'


class Snapshot:
    """The objects in two module trees, to see at once whether they are still the same.

    Anything that puts another tensor in a place of a tree (re-assigned buffers, a new
    ``nn.Parameter``, ``load_state_dict(assign=True)``, a replaced submodule) changes an identity in
    one of its dicts.
    """

    def __init__(self, average: nn.Module, source: nn.Module):
        of_source = _dicts_of(source)
        self.filled = [d for d in of_source + _dicts_of(average) if d]
        self.objects = get_referents(*self.filled)
        # Where the source may get a tensor more. One more in the average has nothing to follow.
        self.empty = [d for d in of_source if not d]

    def holds(self) -> bool:
        # What a dict refers to are its values: one call for all dicts, where a loop over them takes
        # three times as long.
        now = get_referents(*self.filled)
        return (
            len(now) == len(self.objects)
            and all(map(is_, now, self.objects))
            and not any(self.empty)
        )


def _dicts_of(model: nn.Module) -> List[dict]:
    return [d for m in model.modules() for d in (m._parameters, m._buffers, m._modules)]


class Check:
    """What a function says of some tensors, to see at once whether it still says the same."""

    def __init__(self, function: Callable[[Tensor], object], tensors: List[Tensor]):
        self.function = function
        self.tensors = tensors
        self.answers = [*map(function, tensors)]

    def holds(self) -> bool:
        return [*map(self.function, self.tensors)] == self.answers


class Pair(NamedTuple):
    """One tensor of the average and the tensor of the source that it follows."""

    name: str
    average: Tensor
    source: Tensor


def pairs_of(average: nn.Module, source: nn.Module) -> Iterator[Tuple[Pair, bool]]:
    """Yield (pair, whether it is a buffer), each tensor of the average once.

    Raises:
        ValueError: If the two do not have the same tensors, by name and shape.
    """
    sources = {plain(name): tensor for name, tensor, _ in named_tensors(source)}
    names = {plain(name) for name, _, _ in named_tensors(average)}
    _refuse_other_names(names, set(sources))
    followed: Dict[int, Pair] = {}
    for name, tensor, is_buffer in named_tensors(average):
        pair = Pair(plain(name), tensor, sources[plain(name)])
        if pair.average.shape != pair.source.shape:
            raise ValueError(
                f'a tensor must keep its shape while it is averaged, but {pair.name!r} is '
                f'{tuple(pair.average.shape)} in the average and {tuple(pair.source.shape)} in the '
                'source. Make a new averaged model after changing the layers.'
            )
        known = followed.setdefault(id(tensor), pair)
        if known.source is not pair.source:
            raise ValueError(
                f'{known.name!r} and {pair.name!r} were one tied tensor when the average was made '
                'and are two in the source now. Make a new averaged model after untying them.'
            )
        if known is pair:
            yield pair, is_buffer


def plain(name: str) -> str:
    """Return the name that a tensor has without torch.compile."""
    return name.replace('_orig_mod.', '')  # the wrapper that torch.compile adds


def _refuse_other_names(average: set, source: set) -> None:
    if average != source:
        lacks, more = sorted(average - source), sorted(source - average)
        raise ValueError(
            'source and average must have the same tensors, but the source '
            + ' and '.join(
                f'{verb} {names[:3]}{f" and {len(names) - 3} more" if len(names) > 3 else ""}'
                for verb, names in (('lacks', lacks), ('has in addition', more))
                if names
            )
            + '. Make a new averaged model after changing the layers.'
        )


class Pairing:
    """All pairs of an average and a source, sorted by what happens to them; valid while it holds.

    Args:
        average: The averaged copy.
        source: The model being trained.
        is_blended: Tells from a pair, and whether it is a buffer, if it is blended; the others are
            copied at each update.
    """

    def __init__(
        self, average: nn.Module, source: nn.Module, is_blended: Callable[[Pair, bool], bool]
    ):
        self.average = average
        self.source = source
        self.trees = Snapshot(average, source)
        self.blended: List[Pair] = []
        self.copied: List[Pair] = []
        parameters = []
        for pair, is_buffer in pairs_of(average, source):
            (self.blended if is_blended(pair, is_buffer) else self.copied).append(pair)
            if not is_buffer:
                parameters.append(pair.source)
        self.blended_rows, rest = _sort_out_rows(self.blended)
        self.blended_runs, single = _sort_out_runs(rest)
        self.like, self.unlike = _sort_by_likeness(single)
        self.copied_rows, rest = _sort_out_rows(self.copied)
        self.copied_runs, single = _sort_out_runs(rest)
        self.copied_like, self.copied_unlike = _sort_by_likeness(single)
        if native.compiled is None:
            self.watches = [self.trees, *self._checks(parameters)]
        else:
            sides = _sides(self.blended + self.copied)
            self.watches = [native.compiled.Watch(self.trees.filled + self.trees.empty, *sides)]

    def _checks(self, parameters: List[Tensor]) -> List[Check]:
        """All that can change while a tensor stays itself and would lead an operator astray."""
        pairs = self.blended + self.copied
        blended = [pair.source for pair in self.blended]
        gathered = [source for run in self.copied_runs for source in run.sources]
        return [
            # What is converted or re-assigned through .data moves; a run keeps its old memory, so
            # nothing else gets that address.
            Check(Tensor.data_ptr, [pair.average for pair in pairs]),
            Check(Tensor.numel, [pair.source for pair in pairs]),
            # Copying converts, only gathering needs one device.
            Check(Tensor.get_device, blended + gathered),
            Check(attrgetter('dtype'), blended),
            Check(attrgetter('requires_grad'), parameters),
        ]

    def holds(self, average: nn.Module, source: nn.Module) -> bool:
        return (
            average is self.average
            and source is self.source
            and all(watch.holds() for watch in self.watches)
        )

    def copy(self) -> None:
        """Copy the copied pairs."""
        for rows in self.copied_rows:
            rows.copy()
        for run in self.copied_runs:
            torch.cat(run.sources, out=run.average)
        for averages, sources in self.copied_like:
            copy_all(averages, sources)
        for pair in self.copied_unlike:
            pair.average.copy_(pair.source)

    def copy_blended(self) -> None:
        """Copy the blended pairs, as the first update after a hard restart does."""
        copy_all([pair.average for pair in self.blended], [pair.source for pair in self.blended])

    def blend(self, momentum: float) -> None:
        """``avg <- (1 - momentum) avg + momentum src`` for every blended pair."""
        for rows in self.blended_rows:
            rows.lerp(momentum)
        for run in self.blended_runs:
            run.average.lerp_(torch.cat(run.sources, out=run.gathered), momentum)
        for averages, sources in self.like:
            torch._foreach_lerp_(averages, sources, momentum)
        for pair in self.unlike:
            average = pair.average
            average.lerp_(pair.source.to(average.device, average.dtype), momentum)


def _sides(pairs: List[Pair]) -> Tuple[List[Tensor], List[Tensor]]:
    return [pair.average for pair in pairs], [pair.source for pair in pairs]


def _sort_out_rows(pairs: List[Pair]):
    """Return what the compiled part does, one of its objects for each dtype, and the other pairs."""
    if not hasattr(native.compiled, 'Rows'):
        return [], pairs
    rows: Dict[torch.dtype, List[Pair]] = {}
    others = []
    for pair in pairs:
        (rows.setdefault(pair.average.dtype, []) if _is_row(pair) else others).append(pair)
    return [native.compiled.Rows(*_sides(group)) for group in rows.values()], others


def _is_row(pair: Pair) -> bool:
    """Tell whether both are what they seem: plain numbers in a row in main memory."""
    return pair.average.dtype == pair.source.dtype and all(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device.type == 'cpu'
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_complex() or tensor.is_neg() or tensor.is_quantized)
        and not tensor.is_inference()
        for tensor in (pair.average, pair.source)
    )


class Run(NamedTuple):
    """Vectors of the average that lie end to end, as one tensor, and the sources they follow."""

    average: Tensor
    sources: List[Tensor]
    gathered: Tensor


def _sort_out_runs(pairs: List[Pair]) -> Tuple[List[Run], List[Pair]]:
    """Return the runs among the pairs, and the pairs that are in none."""
    runs: List[List[Pair]] = []
    single = []
    end, size = None, 0
    for pair in sorted(pairs, key=lambda pair: pair.average.data_ptr()):
        average, source = pair.average, pair.source
        kind = (average.dtype, average.device)
        if (
            not _is_small_vector(average)
            or not average.is_contiguous()
            or kind != (source.dtype, source.device)
        ):
            single.append(pair)
            continue
        start = (average.dtype, average.untyped_storage().data_ptr(), average.data_ptr())
        if start != end or size + average.numel() > _RUN:
            runs.append([])
            size = 0
        runs[-1].append(pair)
        size += average.numel()
        end = (*start[:2], start[2] + average.numel() * average.element_size())
    return [_run_of(run) for run in runs], single


def _run_of(pairs: List[Pair]) -> Run:
    first = pairs[0].average.detach()
    size = sum(pair.average.numel() for pair in pairs)
    return Run(
        first.as_strided((size,), (1,)),
        [pair.source for pair in pairs],
        torch.empty(size, dtype=first.dtype, device=first.device),
    )


def _sort_by_likeness(pairs: List[Pair]):
    """Return lists for one fused call each, and the pairs that need a conversion.

    A fused kernel takes a list only if all of it has one dtype, one device and, pair by pair, one
    memory layout.
    """
    groups: Dict[tuple, Tuple[List[Tensor], List[Tensor]]] = {}
    unlike = []
    for pair in pairs:
        average, source = pair.average, pair.source
        if (average.dtype, average.device) != (source.dtype, source.device):
            unlike.append(pair)
            continue
        key = (average.dtype, average.device, average.stride() == source.stride())
        averages, sources = groups.setdefault(key, ([], []))
        averages.append(average)
        sources.append(source)
    return list(groups.values()), unlike


def copy_all(targets: List[Tensor], sources: List[Tensor]) -> None:
    """Copy tensor by tensor, fused where torch can."""
    # torch 2.0 cannot. Later ones up to 2.10 may write wrong numbers on a GPU into targets of more
    # than one dtype (pytorch 173531).
    if hasattr(torch, '_foreach_copy_') and len({target.dtype for target in targets}) == 1:
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources):
        target.copy_(source)
