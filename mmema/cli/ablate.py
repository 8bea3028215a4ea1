"""Compare averages that ride along in the same runs, over several seeds.

mmema ablate configs/digits/yolov5_n_ablation.py --seeds 12 --out work_dirs/evidence
mmema ablate report work_dirs/evidence    (report.md and differences.png once more)

Each seed is one training, in a process of its own. All averages in `also` of the config's EMAHook
are evaluated on val_dataloader (to choose an epoch) and on test_dataloader (to report). `ablation`
of the config says what is compared; without it, each average is compared with the raw weights and
with the main average. A call that was interrupted goes on where it was. runs.csv holds every value
and questions.json the comparisons; several configs can have the same --out.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from ..run.config import averages_in, hooks_in
from ..run.metrics import prefixes_in, watched_metric
from . import ablation_data as data
from . import common as cli
from .progress import ProgressBar

CHILD = 'mmema.cli.ablation_run'
ONE_THREAD = {f'{name}_NUM_THREADS': '1' for name in ('OMP', 'MKL', 'OPENBLAS', 'VECLIB_MAXIMUM')}


def main(argv=None):
    if argv[:1] == ['report']:
        make_report(report_args(argv[1:]).folder, said=[])
        return
    args = parse_args(argv)
    cli.check_arguments(args)
    cli.import_stack()
    config = cli.load_config(args)
    check_config(config)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / '.lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            cli.die(f'another ablation writes to {out}: wait for it, or name another --out')
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        said = run_all(Ablation(config, out), seeds, args.jobs)
        collect(out, config)
    make_report(out, said)
    if said:
        sys.exit(1)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument('config', help='file of the config, or the word report')
    parser.add_argument('--seeds', type=int, default=12, help='number of runs (12)')
    parser.add_argument('--first-seed', type=int, default=100, help='seed of the first one (100)')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder of the results')
    parser.add_argument(
        '--jobs', type=int, default=os.cpu_count(), help='runs side by side (one for each core)'
    )
    parser.add_argument('--cfg-options', nargs='+', action='extend', default=[], metavar='K=V')
    parser.set_defaults(launcher='none', work_dir=None, local_rank=0, resume=None)
    args = parser.parse_args(argv)
    for name, least in (('seeds', 2), ('first_seed', 0), ('jobs', 1)):
        if getattr(args, name) < least:
            option = name.replace('_', '-')
            parser.error(f'--{option} must be at least {least}, got {getattr(args, name)}')
    return args


def report_args(argv):
    parser = argparse.ArgumentParser(prog='mmema ablate report', allow_abbrev=False)
    parser.add_argument('folder', type=Path, help='folder with runs.csv')
    return parser.parse_args(argv)


def make_report(folder, said):
    from .ablation_report import report

    with cli.one_line('no report', data.DataError):
        report(folder, said)
    print(f'{folder / "report.md"}\n{folder / "differences.png"}')


def check_config(config):
    """Refuse a config that has nothing to compare, or one split for two purposes."""
    from .ablation_run import is_coco_map

    splits = [f'{split}_{part}' for split in data.SPLITS for part in ('dataloader', 'evaluator')]
    cli.need(config, 'train_dataloader', 'train_cfg', 'optim_wrapper', *splits)
    if not averages_in(config):
        cli.die(
            f'{config.filename} has no EMAHook with averages in `also`: there is nothing to compare'
        )
    if config.train_cfg.get('max_epochs') is None:
        cli.die(f'{config.filename} is a run by iterations; epochs are compared (max_epochs)')
    config.setdefault('ablation', {})
    config.ablation.setdefault('family', Path(config.filename).stem)
    config.ablation.setdefault('schedule', 'as configured')
    if is_coco_map(config):
        for split in data.SPLITS:
            file = config[f'{split}_evaluator'].get('ann_file')
            if not (file and os.path.isfile(file)):
                cli.die(f'{split}_evaluator.ann_file must be annotations of COCO, got {file}')
    first, second = (read_by(config, split) for split in data.SPLITS)
    if first == second:
        cli.die(
            f'val_evaluator chooses epochs and test_evaluator reports, but both read {first}: '
            'a report needs data of its own'
        )
    check_questions(config)


def read_by(config, split):
    """Return the annotations of a split, else the settings of its dataset."""
    evaluator = config[f'{split}_evaluator']
    file = evaluator.get('ann_file') if isinstance(evaluator, dict) else None
    return os.path.realpath(file) if file else config[f'{split}_dataloader'].dataset


def check_questions(config):
    """Refuse `ablation` of a config where it names what is not there."""
    others, asked = averages_in(config), config.ablation
    unknown = set(asked) - {'family', 'schedule', 'metric', 'recalibrate', *data.ASKED}
    if unknown:
        cli.die(f'ablation has no {", ".join(sorted(unknown))}; it has {", ".join(data.ASKED)}')
    recalibrated = dict(asked.get('recalibrate') or {})
    for name, of in recalibrated.items():
        if of not in others or name in others:
            cli.die(
                f'ablation.recalibrate must give a new name to an average of `also`, got '
                f'{name}={of!r}'
            )
    with cli.one_line('ablation', data.DataError):
        data.questions_in(asked).pairs(['raw', 'ema', *others, *recalibrated])


def rule_of(config, metric):
    """Return which values of a metric are better: 'less', 'greater', or None if nobody knows."""
    asked, prefixes = config.ablation.get('rule'), prefixes_in(config).values()
    watched = watched_metric(hooks_in(config), [metric], prefixes, metric, asked)
    return {True: 'less', False: 'greater', None: None}[watched.less]


class Ablation:
    """Folders of the runs of one config."""

    def __init__(self, config, out):
        from . import ablation_run as runs

        self.result = runs.RESULT
        name = f'{config.ablation.family} {config.ablation.schedule}'
        self.name = ''.join(letter if letter.isalnum() else '_' for letter in name)
        self.folder = out / 'runs' / self.name
        self.config = self.folder / 'config.py'
        self.folder.mkdir(parents=True, exist_ok=True)
        text = as_trained(config).pretty_text
        if not self.config.exists():
            self.config.write_text(text)
        elif self.config.read_text() != text:
            cli.die(
                f'{self.folder} has runs of this family and schedule with other settings '
                f'({self.config}): name another --out, or another ablation.schedule'
            )

    def run_folder(self, seed):
        return self.folder / f'seed_{seed}'

    def is_done(self, seed):
        return (self.run_folder(seed) / self.result).is_file()


def as_trained(config):
    """Return a config without what its runs do not depend on: their folder, and the questions."""
    config = deepcopy(config)
    config.work_dir = None
    for key in data.ASKED:
        config.ablation.pop(key, None)
    return config


def run_all(ablation, seeds, jobs):
    """Run the seeds that are not done; return a line about each that failed."""
    failed = []
    running = Running()
    bar = ProgressBar(ablation.name, len(seeds))
    with bar, ThreadPoolExecutor(jobs) as pool:
        todo = [seed for seed in seeds if not ablation.is_done(seed)]
        bar.advance(len(seeds) - len(todo))
        futures = {pool.submit(running.run, ablation, seed): seed for seed in todo}
        try:
            for future in as_completed(futures):
                reason = future.result()
                bar.advance()
                if reason:
                    failed.append(f'{ablation.name}, seed {futures[future]}: {reason}')
                    bar.say(f'failed, left out: {failed[-1]}')
        except KeyboardInterrupt:
            for future in futures:
                future.cancel()
            running.stop()
            cli.note('interrupted; the same call goes on where it was')
            sys.exit(130)
    return failed


class Running:
    """The processes that run now."""

    def __init__(self):
        self.processes = set()
        self.stopped = False

    def run(self, ablation, seed):
        """Run one seed to its end; return why it failed, or None."""
        folder = ablation.run_folder(seed)
        folder.mkdir(exist_ok=True)
        with open(folder / 'log.txt', 'a') as log:
            process = subprocess.Popen(
                [sys.executable, '-u', '-m', CHILD, ablation.config, folder, str(seed)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **ONE_THREAD},
            )
            self.processes.add(process)
            if self.stopped:
                process.terminate()
            process.wait()
            self.processes.discard(process)
        if process.returncode == 0:
            return None
        lines = (folder / 'log.txt').read_text().split('\n')
        last = next((line.strip() for line in reversed(lines) if line.strip()), 'no message')
        return f'{last} (exit status {process.returncode}; {folder / "log.txt"})'

    def stop(self):
        self.stopped = True
        for process in list(self.processes):
            process.terminate()


def collect(out, config):
    """Bring the results and the questions of all runs together; those of other runs stay."""
    path = out / data.RUNS
    found = {}
    files = [path] if path.exists() else []
    files += sorted(out.glob('runs/*/seed_*/result.csv'))
    with cli.one_line(f'no {data.RUNS}', data.DataError):
        for file in files:
            runs = {}
            for row in data.read_rows(file):
                runs.setdefault(row[:3], []).append(row)
            found.update(runs)
        questions = data.read_questions(out)
    asked = config.ablation
    about = asked.family, asked.schedule
    metric = next((rows[0][6] for key, rows in found.items() if key[:2] == about), None)
    questions[about] = replace(data.questions_in(asked), rule=rule_of(config, metric))
    data.write_questions(out, questions)
    order = {about: k for k, about in enumerate(dict.fromkeys(key[:2] for key in found))}
    rows = [row for key in sorted(found, key=lambda k: (order[k[:2]], k[2])) for row in found[key]]
    data.write_rows(path, rows)
