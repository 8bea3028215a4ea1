"""Extension of griffe: docstrings and signatures of mmema as the site of docs/ can show them."""

import importlib
import inspect
import re

import griffe


class HouseStyle(griffe.Extension):
    def on_package(self, *, pkg, **kwargs):
        for member in everything_in(pkg):
            if member.docstring:
                member.docstring.value = as_griffe_reads_it(member.docstring.value)
            if member.is_class and has_own_signature(member):
                give_signature(member)


def everything_in(owner):
    for member in owner.members.values():
        if not member.is_alias:
            yield member
            yield from everything_in(member)


def as_griffe_reads_it(text):
    text = re.sub(r'^( *)Example:$', r'\1Examples:', text, flags=re.MULTILINE)
    return re.sub(r':\w+:`~?([^`]+)`', r'`\1`', text)


def has_own_signature(member):
    module = importlib.import_module(member.module.path)
    return hasattr(getattr(module, member.name), '__signature__')


def give_signature(member):
    """Give a class the signature that it makes when it is defined, which no source text has."""
    signature = inspect.signature(getattr(importlib.import_module(member.module.path), member.name))
    parameters = [
        griffe.Parameter(
            one.name,
            kind=griffe.ParameterKind.positional_or_keyword,
            annotation=None if one.annotation is one.empty else str(one.annotation),
            default=None if one.default is one.empty else repr(one.default),
        )
        for one in signature.parameters.values()
    ]
    self = griffe.Parameter('self', kind=griffe.ParameterKind.positional_or_keyword)
    init = griffe.Function('__init__', parameters=griffe.Parameters(self, *parameters))
    member.set_member('__init__', init)
