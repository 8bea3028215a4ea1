#!/usr/bin/env python3
"""Run the tests marked gpu and the benchmark on this machine, and write one report.

    make gpu                          (with the python3 that has torch: make gpu PYTHON=...)
    make gpu DEVICE=cpu ARGS=--quick  (the same way without a GPU, to see that it works)

It needs torch, MMEngine and pytest, no set-up and no network. Other libraries are measured where
they are installed; where mmyolo is not, stand-ins have the tensors of its models. The report,
report.md with report.json, says which aims are met.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = 'not measured'


def main():
    args = parse_args()
    import torch

    if args.device != 'cpu' and not torch.cuda.is_available():
        sys.exit(
            f'make gpu needs a CUDA device, and torch {torch.__version__} of {sys.executable} sees '
            'none. `make gpu DEVICE=cpu` goes the same way on the CPU.'
        )
    args.out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(paths)}
    tests = run_tests(environment)
    command = ['benchmarks/update_cost.py', '--device', args.device, '--out', args.out.resolve()]
    failed, _ = call([*command, *(['--quick'] if args.quick else [])], environment)
    if failed:
        sys.exit(f'the benchmark ended with {failed}; there is no report')
    figures = json.loads((args.out / 'performance.json').read_text())
    report = {'tests': tests, 'aims': aims(figures), **figures}
    (args.out / 'report.json').write_text(json.dumps(report, indent=1))
    (args.out / 'report.md').write_text(
        text_of(report, (args.out / 'performance.md').read_text(), args.device)
    )
    for name in ('performance.md', 'performance.json'):  # the report holds them
        (args.out / name).unlink()
    print(args.out / 'report.md')
    if tests['failed']:
        sys.exit(1)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--device', default='cuda', choices=['cpu', 'cuda'], help='default: cuda')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu'), metavar='DIR')
    parser.add_argument('--quick', action='store_true', help='benchmark the smallest model only')
    return parser.parse_args()


def call(arguments, environment):
    """Run Python with these arguments; return its exit status and what it printed."""
    command = [sys.executable, '-W', 'ignore', *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end='', flush=True)
    return done.returncode, done.stdout


def run_tests(environment):
    """Run the tests marked gpu; return pytest's summary, and its lines about those that failed."""
    # Only their files: others may need libraries that are not there.
    files = sorted(
        file.relative_to(ROOT)
        for file in (ROOT / 'tests').rglob('test_*.py')
        if re.search('^from marks import .*GPU', file.read_text(), re.MULTILINE)
    )
    status, text = call(['-m', 'pytest', '-q', '-m', 'gpu', *files], environment)
    lines = text.splitlines() or ['pytest printed nothing']
    failed = [line for line in lines if line.startswith(('FAILED', 'ERROR'))]
    return {'summary': lines[-1], 'failed': failed or ['pytest'] * bool(status)}


# --- aims ---------------------------------------------------------------------------------------


def aims(figures):
    """Return [aim, figure in words, whether it is met]; None where it was not measured."""
    on_gpu = figures['device'] != 'cpu'
    updates, launches = figures['updates'], figures.get('launches', {})

    def times(model, name, base, state='device'):
        seconds = updates.get(model, {}).get(state, {}) if on_gpu else {}
        if name not in seconds or base not in seconds:
            return None
        return median(a / b for a, b in zip(seconds[name], seconds[base]))

    def row(aim, value, met, unit):
        return [aim, NOT_MEASURED if value is None else f'{value:.2f}{unit}', value and met(value)]

    limit, rows = 'limit: one flat lerp_', []
    for model, most in (('YOLOv5-n', 2), ('YOLOv5-s', 1.2), ('YOLOv5-l', 1.2), ('300 M', 1.2)):
        value = times(model, 'mmema', limit)
        aim = f'{model}: at most {most} times the limit on the device'
        rows.append(row(aim, value, lambda v, most=most: v <= most, ' times'))
    for model in ('YOLOv5-n', 'YOLOv5-s'):
        for library, least in (('mmdet', 5), ('mmyolo', 2.5)):
            value = times(model, library, 'mmema')
            aim = f"{model}: at least {least} times as fast as {library}'s class"
            rows.append(row(aim, value, lambda v, least=least: v >= least, ' times'))
    host = updates.get('YOLOv5-s', {}).get('host', {}).get('mmema') if on_gpu else None
    value = host and median(host) * 1e3
    rows.append(row('YOLOv5-s: at most 0.3 ms on the host', value, lambda v: v <= 0.3, ' ms'))
    value = times('YOLOv5-l', 'synchronous copies to main memory', "mmema, device='cpu'")
    aim = 'YOLOv5-l: staging costs the stream a third of synchronous copies, or less'
    rows.append(row(aim, value, lambda v: v >= 3, ' times less'))
    counts = [both for model in launches.values() for n, both in model.items() if n == 'mmema']
    for aim, place, most in (('at most 10 launches', 0, 10), ('no wait for the GPU', 1, 0)):
        most_seen = max((both[place] for both in counts), default=None)
        seen = NOT_MEASURED if most_seen is None else f'at most {most_seen}'
        rows.append([f'an update: {aim}', seen, None if most_seen is None else most_seen <= most])
    return rows


def text_of(report, performance, device):
    """Return the report as Markdown."""
    tests, words = report['tests'], {None: '-', True: 'yes', False: '**no**'}
    lines = [
        f'# mmema on a {"CPU" if device == "cpu" else "GPU"}',
        '',
        f'`make gpu DEVICE={device}`',
        '',
        f'Tests marked `gpu`: {tests["summary"]}',
        *(f'- {line}' for line in tests['failed']),
        '',
        '| aim | figure | met |',
        '| --- | --- | --- |',
        *(f'| {aim} | {figure} | {words[met]} |' for aim, figure, met in report['aims']),
        '',
    ]
    return '\n'.join(lines) + '\n' + performance


if __name__ == '__main__':
    main()
