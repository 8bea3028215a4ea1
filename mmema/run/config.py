"""A config as plain values: read from the text in a checkpoint, its hooks, its length."""

from __future__ import annotations

import ast


def hooks_in(config: dict) -> list[dict]:
    """Return the settings of all hooks of a config."""
    default, custom = config.get('default_hooks') or {}, config.get('custom_hooks') or []
    hooks = [*default.values(), *(custom if isinstance(custom, list) else ())]
    return [hook for hook in hooks if isinstance(hook, dict)]


def ema_hook_in(config: dict) -> dict:
    """Return the settings of the EMAHook of a config, of whatever library; else an empty dict."""
    return next((hook for hook in hooks_in(config) if kind_of(hook).endswith('EMAHook')), {})


def averages_in(config: dict) -> list[str]:
    """Return the names of the averages in ``also``, which stand beside the main one."""
    return list(ema_hook_in(config).get('also') or {})


def type_of(settings: dict) -> str:
    """Return the name of a type, with its scope or module where the settings have that."""
    kind = settings.get('type', '')
    return f'{kind.__module__}.{kind.__name__}' if isinstance(kind, type) else str(kind)


def kind_of(settings: dict) -> str:
    """Return the name of a type without scope and module."""
    return type_of(settings).rsplit('.', 1)[-1]


def is_ours(settings: dict) -> bool:
    """Return whether the settings are of a class of mmema."""
    return type_of(settings).startswith('mmema.')


def is_by_epoch(config: dict) -> bool:
    """Return whether a run counts epochs rather than iterations."""
    train = config.get('train_cfg') or {}
    return train.get('by_epoch', 'IterBased' not in type_of(train))


def epochs_of(config: dict) -> int:
    """Return the number of epochs of a run; 1 if it is one by iterations, as for MMEngine."""
    return config['train_cfg']['max_epochs'] if is_by_epoch(config) else 1


def read_config(text: str) -> dict:
    """Return the settings in a config's text as dicts, lists, numbers and strings.

    MMEngine keeps that text in every checkpoint. No code in it is run. Settings that are no plain
    values, such as an object made by a call, are left out.

    Example:
        >>> read_config("custom_hooks = [dict(type='EMAHook', momentum=0.1, other=f(1))]")
        {'custom_hooks': [{'type': 'EMAHook', 'momentum': 0.1}]}
    """
    try:
        lines = ast.parse(text).body
    except (SyntaxError, ValueError):  # ValueError: null bytes
        return {}
    settings = {}
    for line in lines:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            settings.update(_plain([(line.targets[0].id, line.value)]))
    return settings


def _plain(items) -> dict:
    """Return the values of (name, node) pairs by name, without those that are not plain."""
    values = {}
    for name, node in items:
        try:
            values[name] = _value(node)
        except ValueError:
            continue
    return values


def _value(node: ast.AST):
    if isinstance(node, ast.Call) and getattr(node.func, 'id', None) == 'dict':
        given = [item for item in node.args if isinstance(item, ast.Dict)]  # dict({'a-b': 1})
        values = {key: value for one in given for key, value in _value(one).items()}
        return {**values, **_plain((keyword.arg, keyword.value) for keyword in node.keywords)}
    if isinstance(node, ast.Dict):
        keys = [key and ast.literal_eval(key) for key in node.keys]  # None: `**other`
        return _plain((key, value) for key, value in zip(keys, node.values) if key is not None)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts]
    return ast.literal_eval(node)
