"""``mmema COMMAND``: calls the module of a command with the arguments that follow it."""

from __future__ import annotations

import sys
from importlib import import_module

from . import common

# Command: its module, and the line of the help. A module has main(argv).
COMMANDS = {
    'train': ('train', 'train a model from any MMYOLO, MMDetection or MMEngine config'),
    'test': ('test', 'evaluate a checkpoint'),
    'plot': ('plot', 'draw the schedule of a config or of a run'),
    'inspect': ('checkpoint', 'say who made a checkpoint, and what is where in it'),
    'export': ('checkpoint', 'write one set of weights to a file for inference'),
    'best': ('checkpoint', 'write the best weights of a whole run to a file'),
    'convert': ('checkpoint', 'take an average over from another code'),
    'posthoc': ('posthoc', 'restarts, other horizons and means after a training'),
    'recalibrate': ('recalibrate', 'measure the BatchNorm statistics of any checkpoint'),
    'ablate': ('ablate', 'train over several seeds and compare the averages'),
}


def main(argv: list[str] | None = None, called: str | None = None) -> None:
    """Run a command.

    Args:
        argv: The command and its arguments. Defaults to None, those of the program.
        called: The name that messages begin with. Defaults to None, ``mmema COMMAND``.
    """
    common.called_as('mmema')
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ['--help']
    if name in ('-h', '--help'):
        print(usage())
        return
    if name not in COMMANDS:
        common.die(f'no command {name}; there are {", ".join(COMMANDS)}')
    module = COMMANDS[name][0]
    common.called_as(called or f'mmema {name}')
    if module == 'checkpoint':  # its commands share one parser
        common.called_as('mmema')
        arguments = [name, *arguments]
    common.run(lambda: import_module(f'.{module}', __package__).main(arguments))


def usage() -> str:
    """Return the list of commands."""
    lines = [f'  {name:<11}  {text}' for name, (_, text) in COMMANDS.items()]
    return '\n'.join(['usage: mmema COMMAND ...', '', *lines])
