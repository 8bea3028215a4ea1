"""The tools of mmema as ``python -m mmema COMMAND``, wherever the package is installed.

They lie in ``mmema/.mim/tools`` of an installed package and in ``tools/`` of a checkout.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).resolve().parent
# Command: the file of the tool with its own command, if it has several; and the line of the help.
COMMANDS = {
    'train': ('train.py', 'train a detector from any MMYOLO or MMDetection config'),
    'test': ('test.py', 'evaluate a checkpoint'),
    'plot': ('plot_ema.py', 'draw the schedule of a config or of a run'),
    'inspect': ('ema_checkpoint.py inspect', 'say who made a checkpoint, and what is where in it'),
    'export': ('ema_checkpoint.py export', 'write one set of weights to a file for inference'),
    'best': ('ema_checkpoint.py best', 'write the best weights of a whole run to a file'),
    'convert': ('ema_checkpoint.py convert', 'take an average over from another code'),
    'posthoc': ('ema_posthoc.py', 'restarts, other horizons and means after a training'),
    'recalibrate': ('recalibrate_bn.py', 'measure the BatchNorm statistics of any checkpoint'),
    'digits': ('make_digits.py', 'make the pictures of configs/digits: digits data/digits'),
    'ablate': ('ablate.py', 'train over several seeds and compare the averages'),
}


def main() -> None:
    """Run the tool of the command with the arguments that follow it."""
    name, arguments = (sys.argv[1:2] or ['--help'])[0], sys.argv[2:]
    if name in ('-h', '--help'):
        print(usage())
        return
    if name not in COMMANDS:
        print(f'mmema: no command {name}; there are {", ".join(COMMANDS)}', file=sys.stderr)
        sys.exit(2)
    tool, *own_command = COMMANDS[name][0].split()
    called = 'python -m mmema' if own_command else f'python -m mmema {name}'
    sys.argv = [called, *own_command, *arguments]
    run_script(tools() / tool)


def run_script(file: Path) -> None:
    """Run a script as Python does, but leave ``sys.argv[0]``, which its messages begin with."""
    sys.path.insert(0, str(file.parent))
    script = sys.modules['__main__'] = ModuleType('__main__')
    script.__file__ = str(file)
    exec(compile(file.read_bytes(), str(file), 'exec'), vars(script))


def usage() -> str:
    """Return the list of commands."""
    lines = [f'  {name:<11}  {text}' for name, (_, text) in COMMANDS.items()]
    return '\n'.join(['usage: python -m mmema COMMAND ...', '', *lines])


def tools() -> Path:
    """Return the folder of the tools."""
    installed = PACKAGE / '.mim' / 'tools'
    return installed if installed.is_dir() else PACKAGE.parent / 'tools'


if __name__ == '__main__':
    main()
