"""Switches of the data pipeline during a run: when they really take place, and what they set."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, Callable, Iterable, NamedTuple, Sequence

from .config import epochs_of, hooks_in, kind_of


class Switch(NamedTuple):
    """One switch of the training pipeline."""

    epoch: int  # 0-based, before which it takes place; it may be beyond the end of the run
    pipeline: Sequence | None = None  # the new one; None if transforms are only left out, or none
    left_out: Sequence[str] = ()  # types of transforms


def switches_of(hooks: Iterable, max_epochs: int) -> dict[str, list[Switch]]:
    """Return the switches of a run of so many epochs, by the name of the hook that makes them.

    Args:
        hooks: The hooks of a Runner, or their settings in a config. Of a class that is derived from
            a switch hook under another name, only the object is known, or settings with the class.
        max_epochs: The epochs of the run; 1 if it is one by iterations, as MMEngine's loop has it.

    Returns:
        The switches in the order of time. A hook that never switches has an empty list.
    """
    found: dict = {}
    for hook in hooks:
        get, names = _read(hook)
        for name in names:
            if name in SWITCHES:
                found.setdefault(name, []).extend(SWITCHES[name](get, max_epochs))
    return {name: sorted(switches, key=attrgetter('epoch')) for name, switches in found.items()}


def use_last_pipeline(config: dict) -> str:
    """Let the training data of a config go through the pipeline that its run ends with, in place.

    Returns which one that is, in words.
    """
    stage, epochs = 'the training pipeline', epochs_of(config)
    by_name = switches_of(hooks_in(config), epochs).items()
    switches = [(switch, name) for name, found in by_name for switch in found]
    for switch, name in sorted(switches, key=lambda pair: pair[0].epoch):
        dataset = config['train_dataloader']['dataset']
        if switch.epoch >= epochs:
            continue
        if switch.pipeline is not None:
            while 'pipeline' not in dataset and 'dataset' in dataset:  # a wrapper of another kind
                dataset = dataset['dataset']
            dataset['pipeline'] = switch.pipeline
        elif switch.left_out and 'pipeline' in dataset:
            steps = dataset['pipeline']
            dataset['pipeline'] = [step for step in steps if kind_of(step) not in switch.left_out]
        else:
            continue
        stage = f'the pipeline after {name} has switched'
    return stage


def _read(hook) -> tuple[Callable[..., Any], list[str]]:
    """Return the getter of a hook's arguments, and the names of its classes."""
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    names = [cls.__name__ for cls in kind.__mro__] if isinstance(kind, type) else [kind_of(hook)]
    if isinstance(hook, dict):
        return hook.get, names
    return lambda name, default=None: getattr(hook, name, default), names


def _of_pipeline_switch_hook(get: Callable, max_epochs: int) -> list[Switch]:
    epoch = get('switch_epoch')  # from which on it is switched
    return [Switch(max(epoch, 0), get('switch_pipeline'))] if isinstance(epoch, int) else []


def _of_yolox_mode_switch_hook(get: Callable, max_epochs: int) -> list[Switch]:
    epoch = max_epochs - get('num_last_epochs', 15) - 1  # it compares epoch + 1
    pipeline = get('new_train_pipeline', get('new_train_pipeline_cfg', ABSENT))
    if pipeline is ABSENT:  # MMDetection's has none, and switches from that epoch on
        return [Switch(max(epoch, 0), None, get('skip_type_keys', MOSAIC))]
    return [Switch(epoch, pipeline)] if epoch >= 0 else []  # MMYOLO's in that one or never


def _of_switch_recipe_hook(get: Callable, max_epochs: int) -> list[Switch]:
    recipes = get('schedule') or {}  # MMPretrain's, by the number of the epoch, from 1
    if not isinstance(recipes, dict):
        recipes = {recipe.get('action_epoch'): recipe for recipe in recipes}
    pipelines = {
        number: None if recipe.get('train_pipeline') == 'unchange' else recipe.get('train_pipeline')
        for number, recipe in recipes.items()
        if isinstance(number, int) and number >= 1
    }
    return [Switch(number - 1, pipeline) for number, pipeline in pipelines.items()]


ABSENT = object()
MOSAIC = ('Mosaic', 'RandomAffine', 'MixUp')  # that MMDetection's YOLOXModeSwitchHook leaves out
SWITCHES = {
    'PipelineSwitchHook': _of_pipeline_switch_hook,
    'YOLOXModeSwitchHook': _of_yolox_mode_switch_hook,
    'SwitchRecipeHook': _of_switch_recipe_hook,
}
SWITCH_HOOKS = tuple(SWITCHES)
