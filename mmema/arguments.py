"""Checks of arguments: an error names the rule and the value received."""

from __future__ import annotations

import math


def check_number(name: str, value) -> None:
    """Raise TypeError if a value is no real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{name} must be a number, got {value!r}')


def check_momentum(value) -> None:
    """Raise TypeError or ValueError if a momentum is not in (0, 1)."""
    check_number('momentum', value)
    if not 0 < value < 1:
        raise ValueError(
            f'momentum must be in (0, 1), got {value}. It is the weight of the new value: one '
            'minus the decay of other libraries.'
        )


def check_positive(name: str, value) -> None:
    """Raise TypeError or ValueError if a number is not above 0 and finite."""
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f'{name} must be above 0 and finite, got {value}')


def check_integer(name: str, value, least: int = 1) -> None:
    """Raise TypeError or ValueError if a value is no integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}')


def check_bool(name: str, value) -> None:
    """Raise TypeError if a value is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, got {value!r}')


def check_choice(name: str, value, choices: tuple) -> None:
    """Raise ValueError if a value is none of the choices."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}')


def check_strings(name: str, value) -> None:
    """Raise TypeError if a value is no list or tuple of strings."""
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise TypeError(f'{name} must be a list of strings, got {value!r}')
