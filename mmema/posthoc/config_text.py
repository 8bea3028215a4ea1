"""Plain values of a config's text, as MMEngine keeps it in every checkpoint; no code is run."""

from __future__ import annotations

import ast


def read_config(text: str) -> dict:
    """Return the settings in a config's text as dicts, lists, numbers and strings.

    Settings that are no plain values, such as an object made by a call, are left out.

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
