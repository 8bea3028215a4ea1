#!/usr/bin/env python3
"""Write the table of docs/models.md: how far the averages of stock models are from the reference.

tests/model_table.py docs/models.md        # between the two marks of the file
tests/model_table.py --find mmyolo         # the configs whose models differ in a name or a shape
"""

import argparse
import contextlib
import gc
import io
import sys
from importlib import import_module
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from reference import tensors_of
from zoo import MMDET, MMYOLO, build, deviation, follow, without_downloads

from mmema import RestartableExpMomentumEMA

BEGIN, END = '<!-- table -->\n', '<!-- end of table -->\n'
HEAD = (
    '| config | parameters | tensors | mmema, all | stock, parameters | stock, all |\n'
    '| --- | ---: | ---: | ---: | ---: | ---: |\n'
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('file', nargs='?', help='file with the two marks')
    parser.add_argument('--find', metavar='LIBRARY', help='mmyolo or mmdet')
    args = parser.parse_args()
    if args.find:
        find(args.find)
    elif args.file:
        write(Path(args.file))
    else:
        parser.error('name the file, or --find LIBRARY')


def write(file):
    text = file.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f'{file} must have the lines {BEGIN.strip()} and {END.strip()}')
    lines = [row('mmyolo', name) for name in MMYOLO] + [row('mmdet', name) for name in MMDET]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    file.write_text(f'{before}{BEGIN}{HEAD}{"".join(lines)}{END}{after}')


def row(library, name):
    stock = import_module(f'{library}.models.layers').ExpMomentumEMA
    with contextlib.redirect_stdout(io.StringIO()):
        model = build(library, name)
        (ours, theirs), reference = follow(model, RestartableExpMomentumEMA, stock)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    numbers = [
        deviation(ours, reference, reference),
        deviation(theirs, reference, parameters),
        deviation(theirs, reference, reference),
    ]
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    size = f'{millions:.1f} M | {len(tensors_of(model))}'
    line = f'| {library}: {name} | {size} | {" | ".join(f"{n:.1g}" for n in numbers)} |\n'
    print(line, end='', flush=True)
    del model, ours, theirs, reference
    gc.collect()
    return line


def find(library):
    init_default_scope(library)
    folder = Path(import_module(library).__file__).parent / '.mim' / 'configs'
    known = set()
    for file in sorted(folder.rglob('*.py'), key=lambda file: (len(file.parts), file)):
        name = str(file.relative_to(folder))
        if '_base_' in name:
            continue
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                config = Config.fromfile(file)
                if 'model' not in config:
                    continue
                without_downloads(config.model)
                with torch.device('meta'):
                    model = MODELS.build(config.model)
        except Exception as error:
            print(f'# {name}: {type(error).__name__}', file=sys.stderr)
            continue
        tensors = [*model.named_parameters(), *model.named_buffers()]
        shapes = str([(name, tuple(tensor.shape)) for name, tensor in tensors])
        if shapes not in known:
            known.add(shapes)
            print(name, flush=True)


if __name__ == '__main__':
    main()
