"""Checks of what users pass: an error names the rule and the value received."""

from __future__ import annotations

import math


def real(name: str, value) -> float:
    """Return a number, or raise TypeError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f'{name} must be a number, got {value!r}')
    return value


def check_momentum(momentum) -> None:
    """Raise TypeError or ValueError if a momentum that is given breaks its rule."""
    if momentum is not None and not 0 < real('momentum', momentum) < 1:
        raise ValueError(
            f'momentum must be in (0, 1), got {momentum}. It is the weight of the new value: one '
            'minus the decay of other libraries.'
        )


def check_positive(name: str, value) -> None:
    """Raise TypeError or ValueError if a number that is given is not above 0 and finite."""
    if value is not None and not 0 < real(name, value) < math.inf:
        raise ValueError(f'{name} must be above 0 and finite, got {value}')


def count(name: str, value, least: int = 1) -> int:
    """Return an integer of at least ``least``, or raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}')
    return value


def one_of(name: str, value, choices: tuple):
    """Return one of the choices, or raise ValueError."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}')
    return value


def flag(name: str, value) -> bool:
    """Return True or False, or raise TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, got {value!r}')
    return value


def check_number(name: str, value) -> None:
    """Raise TypeError if a value is no real number."""
    real(name, value)


def check_integer(name: str, value, least: int = 1) -> None:
    """Raise TypeError or ValueError if a value is no integer of at least ``least``."""
    count(name, value, least)


def check_bool(name: str, value) -> None:
    """Raise TypeError if a value is neither True nor False."""
    flag(name, value)


def check_choice(name: str, value, choices: tuple) -> None:
    """Raise ValueError if a value is none of the choices."""
    one_of(name, value, choices)
