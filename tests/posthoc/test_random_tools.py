"""Random runs: every average is the float64 twin's, and every tool is right or refuses.

`python tests/posthoc/test_random_tools.py MINUTES [SEED]` tries new runs for so long.
"""

import itertools
import logging
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from marks import SEED, SINCE_TORCH_2_6
from mmengine.logging import MMLogger
from twin import FLOATS, assert_sum, copies, train, twin, weighted

from mmema.checkpoints.formats import CheckpointError
from mmema.cli import plot
from mmema.posthoc import derive
from mmema.posthoc.facts import facts_in
from mmema.posthoc.mixture import STATISTICS
from mmema.posthoc.profiles import blends_of, exponential, stored_profiles, uniform
from mmema.run import RunFacts

pytestmark = SINCE_TORCH_2_6
ROUNDING = 2.0**-24


class Drawn:
    """A random run: its settings, and all that the twin has to know of it."""

    def __init__(self, seed):
        draw = self.draw = random.Random(seed)
        self.by_epoch = draw.random() < 0.6
        self.epochs, self.iters = draw.randint(3, 6), draw.randint(10, 22)
        self.averages = {name: self.average() for name in ['ema', 'a', 'b'][: draw.randint(1, 3)]}
        self.best = draw.random() < 0.4 and self.by_epoch
        self.begin = draw.choice([0, 0, 0, draw.randint(2, 7)])
        self.script = [draw.random() for _ in range(30)]
        self.rules = [self.rule() for _ in range(draw.choice([0, 1, 1, 2]))]
        self.own_rules = {
            name: [self.rule(own=True)] if draw.random() < 0.3 else []
            for name in self.averages
            if name != 'ema'
        }
        accumulation = draw.choice([1, 1, 1, 2, 3, 4])
        self.parts = [dict(accumulation=accumulation, batch=draw.choice([6, 6, 12, 4]))]
        length = self.epochs * 4 if self.by_epoch else self.iters
        for stop in sorted(draw.sample(range(3, length), draw.choice([0, 0, 1, 2]))):
            self.parts[-1]['stop'] = stop
            again = dict(self.parts[-1])
            del again['stop']
            if draw.random() < 0.5:
                again['batch'] = draw.choice([6, 12, 4, 3])
            if draw.random() < 0.3:
                again['accumulation'] = draw.choice([1, 2, 4])
            self.parts.append(again)
        self.skipped = draw.sample(range(1, 20), draw.choice([0, 0, 2, 4]))
        self.frozen = draw.choice([range(0), range(0), range(4, 9), range(2, 14)])

    def average(self):
        draw = self.draw
        return dict(
            momentum=draw.choice([0.05, 0.1, 0.3]),
            gamma=draw.choice([1, 3, 8]),
            interval=draw.choice([1, 1, 1, 2, 3]),
            update_buffers=draw.random() < 0.4,
            exclude=draw.choice([[], [], [], ['layers.2.*'], ['norm.*', 'level']]),
        )

    def rule(self, own=False):
        draw = self.draw
        by_epoch = self.by_epoch and draw.random() < 0.5
        most = self.epochs if by_epoch else 4 * self.epochs if self.by_epoch else self.iters
        rule = dict(by_epoch=by_epoch, steps=draw.choice([0, 0, 3, 12, None]))
        if draw.random() < 0.3:
            rule['every'] = draw.randint(1, most - 1)
        else:
            rule['milestones'] = sorted(draw.sample(range(1, most), min(2, most - 1)))
        if rule['steps'] is None or draw.random() < 0.3:
            rule['momentum'] = draw.choice([0.02, 0.2])
        if draw.random() < 0.2:
            rule['gamma'] = draw.choice([2, 5])
        if not own:
            rule['source'] = draw.choice(['model', 'model', 'ema', 'best' if self.best else 'ema'])
        return rule

    def hook(self):
        also = {}
        for name, settings in self.averages.items():
            if name != 'ema':
                also[name] = dict(settings)
                for rule in self.own_rules[name]:
                    also[name]['restart'] = {k: v for k, v in rule.items() if k != 'source'}
        hook = dict(type='mmema.EMAHook', **self.averages['ema'])
        if also:
            hook['also'] = also
        if self.begin:
            hook['begin_iter'] = self.begin + 1
        return hook

    def train(self, folder):
        settings = dict(epochs=self.epochs) if self.by_epoch else dict(iters=self.iters)
        hooks = [dict(type='mmema.EMARestartHook', **rule) for rule in self.rules]
        return train(
            folder,
            *hooks,
            dict(type='mmema.EMAMonitorHook'),
            ema=self.hook(),
            parts=self.parts,
            frozen=self.frozen,
            skipped=self.skipped,
            script=self.script,
            val_interval=1 if self.by_epoch else 1000,
            checkpoint={} if self.best else dict(save_best=None),
            **settings,
        )

    def moments(self, rules, rows):
        """Return the restarts in the order of time, as `twin` takes them."""
        found = []
        for place, rule in enumerate(rules):
            unit = 'epoch' if rule['by_epoch'] else 'iter'
            values = {k: rule[k] for k in ('steps', 'momentum', 'gamma', 'source') if k in rule}
            last = getattr(rows[-1], unit) + 1
            times = rule.get('milestones') or range(rule['every'], last, rule['every'])
            for at in times:
                begin = next((r.iter for r in rows if getattr(r, unit) >= at), None)
                if begin is not None:
                    found.append((begin, place, values))
        return [('iter', begin, values) for begin, _, values in sorted(found, key=lambda m: m[:2])]

    def best_rows(self, row, rows):
        """Return the rows before the best validation so far; all where there was none."""
        ends = [sum(r.epoch < epoch for r in rows) for epoch in range(1, row.epoch + 1)]
        scores = self.script[1 : row.epoch + 1]
        return ends[int(np.argmax(scores))] if scores else None

    def twins(self, rows):
        result = {}
        for name, settings in self.averages.items():
            rules = self.rules if name == 'ema' else self.own_rules[name]
            result[name] = [
                (steps, shares.copy(), last)
                for steps, shares, last in twin(
                    rows,
                    ema=settings,
                    restarts=self.moments(rules, rows),
                    begin=self.begin,
                    best=lambda row: self.best_rows(row, rows),
                )
            ]
        return result

    def selection(self, name):
        return {key: self.averages[name][key] for key in ('update_buffers', 'exclude')}


def spread(rows, name):
    return (
        float(sum((r.tensors[name] - rows[-1].tensors[name]).square().sum() for r in rows)) ** 0.5
    )


def largest(rows, name):
    return float(max(row.tensors[name].abs().max() for row in rows))


def check(seed, folder):
    """Train the run of a seed and try every tool on it; return how many were right and refused."""
    drawn, count = Drawn(seed), SimpleNamespace(right=0, refused=0)
    try:
        run = drawn.train(folder)
    except (ValueError, AssertionError):  # rules that disagree; lengths that MMEngine refuses
        return None
    rows, draw = run.rows, drawn.draw
    twins = drawn.twins(rows)
    files = []
    for number in range(1, len(rows) + 1):
        name = f'epoch_{number}' if drawn.by_epoch else f'iter_{number}'
        file = run.folder / f'{name}.pth'
        if file.exists():
            files.append(facts_in(file))
    for facts in files:
        stored = torch.load(facts.file, weights_only=True)
        states = {'ema': (stored['state_dict'], stored['ema_state_dict']['steps'])}
        for name, other in stored.get('ema_also', {}).items():
            state = other['state_dict']
            own = {key[7:]: value for key, value in state.items() if key.startswith('module.')}
            states[name] = own, state['steps']
        for name, (state, steps) in states.items():
            expected, shares, last = twins[name][facts.iteration - 1]
            assert int(steps) == expected, f'{name} in {facts}: {int(steps)} steps, not {expected}'
            if shares.any():
                assert_sum(state, rows, shares, rows[last], **drawn.selection(name))
    check_restarts(drawn, run, files, twins, count)
    check_fits(drawn, run, files, twins, count)
    check_means(run, files, draw, count)
    check_plot(drawn, run, files, twins, count)
    return count


def check_restarts(drawn, run, files, twins, count):
    pairs = [*itertools.combinations(files, 2)]
    for one, other in drawn.draw.sample(pairs, min(6, len(pairs))):
        for name in drawn.averages:
            try:
                made = derive.restart(one.file, other.file, name)
            except CheckpointError:
                count.refused += 1
                continue
            shares = twins[name][other.iteration - 1][1]
            tail = np.where(np.arange(len(shares)) >= one.iteration, shares, 0)
            tolerance = 20 * ROUNDING / tail.sum() + 2e-6
            for tensor in FLOATS:
                selection = drawn.selection(name)
                if copies(tensor, **selection):
                    expected = run.rows[other.iteration - 1].tensors[tensor]
                else:
                    expected = weighted(run.rows, tail / tail.sum(), tensor)
                off = (made.state[tensor].double() - expected).abs().max()
                size = largest(run.rows, tensor)
                assert off <= tolerance * size + 1e-7, f'restart {one} {other} {name}: {tensor}'
            count.right += 1


def check_fits(drawn, run, files, twins, count):
    stored, _ = stored_profiles(files)
    rows = run.rows[: files[-1].iteration]
    for one in stored:
        if one.weights != 'raw':
            shares = twins[one.weights][one.facts.iteration - 1][1]
            np.testing.assert_allclose(one.profile(), shares[: one.total], rtol=1e-9, atol=1e-15)
    main = [one for one in stored if one.weights == 'ema']
    if not main:
        count.refused += 1
        return
    begin = drawn.draw.randint(0, max(rows[-1].epoch, 1) if drawn.by_epoch else len(rows) // 2)
    start = files[-1].iteration_of(begin)
    if drawn.by_epoch:
        assert start == next((r.iter for r in rows if r.epoch >= begin), len(rows))
    selection = drawn.selection('ema')
    at = [i for i in lineage(drawn, rows) if i >= start]
    if not at:
        return
    wanted = np.zeros(len(rows))
    for kind in ('mean', 0.15, 0.5):
        weights = np.ones(len(at)) if kind == 'mean' else (1 - kind) ** np.arange(len(at))[::-1]
        wanted[at] = weights / weights.sum()
        total, blends = stored[-1].total, blends_of(stored)
        if kind == 'mean':
            own = uniform(start, total, blends)
        else:
            own = exponential(kind, None, start, total, blends)
        np.testing.assert_allclose(own, wanted, rtol=1e-9, atol=1e-15)
        try:
            made, found = derive.fit(stored, own, force=True)
        except CheckpointError:
            count.refused += 1
            continue
        error = made.meta['mmema']['error']
        for tensor in FLOATS:
            if copies(tensor, **selection) or tensor.endswith(STATISTICS):
                continue
            off = float((made.state[tensor].double() - weighted(rows, wanted, tensor)).norm())
            most = error * float(np.linalg.norm(wanted)) * spread(rows, tensor)
            rounding = 50 * ROUNDING * max(found.size, 10) * largest(rows, tensor)
            assert off <= most * 1.0001 + rounding, (
                f'{tensor} of {kind} is off by {off}, not {most}'
            )
        count.right += 1


def lineage(drawn, rows):
    """Return the iterations at which the main average was blended or copied, and never undone."""
    settings = drawn.averages['ema']
    restarts, done = drawn.moments(drawn.rules, rows), set()
    steps, due, found, states = 0, False, [], []
    for row in rows:
        for which, (_, at, new) in enumerate(restarts):
            if which in done or row.iter < at:
                continue
            done.add(which)
            if new.get('source') == 'best':
                best = drawn.best_rows(row, rows)
                if best:
                    steps, due, found = states[best - 1]
                    found = list(found)
            if new.get('steps') is not None:
                due |= steps == 0 and new['steps'] > 0
                steps = new['steps']
        if row.stepped:
            begun = row.iter >= drawn.begin
            if not begun or due or steps % settings['interval'] == 0:
                found.append(row.iter)
            if begun:
                steps, due = steps + 1, False
            elif not due:
                steps = 0
        states.append((steps, due, list(found)))
    return found


def check_means(run, files, draw, count):
    if len(files) < 2:
        return
    some = sorted(draw.sample(files, min(3, len(files))), key=lambda file: file.iteration)
    made = derive.mean([file.file for file in some])
    for tensor in FLOATS:
        expected = sum(run.rows[f.iteration - 1].tensors[tensor] for f in some) / len(some)
        torch.testing.assert_close(made.state[tensor].double(), expected, rtol=1e-5, atol=1e-6)
    count.right += 1


def check_plot(drawn, run, files, twins, count):
    found = plot.last_record(run.folder)
    if found is None:
        count.refused += 1
        return
    history, parts, _ = found
    last = max(files, key=lambda file: file.iteration)
    length = parts[-1]['epoch_length']
    facts = RunFacts(last.iteration, length)
    curves = SimpleNamespace(update_at=history.at, all_momenta=history.momenta, parts=parts)
    first, share = plot.shares_of_blocks(curves, SimpleNamespace(facts=facts, block=5))
    shares = twins['ema'][last.iteration - 1][1]
    ends = [*first[1:], last.iteration]
    expected = [100 * shares[begin:end].sum() for begin, end in zip(first, ends)]
    np.testing.assert_allclose(share, expected, rtol=1e-9, atol=1e-12)
    if drawn.by_epoch:
        starts = [next(r.iter for r in run.rows if r.epoch >= e) for e in range(len(first))]
        assert list(first) == starts
    count.right += 1


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize('seed', range(8))
def test_every_tool_is_right_or_refuses(seed, tmp_path):
    check(seed, tmp_path)


@pytest.mark.extensive
@pytest.mark.parametrize('number', range(300))
def test_many_runs(number, tmp_path):
    check(f'{SEED} {number}', tmp_path)


def main():
    minutes, base = float(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else str(time.time())
    logging.disable(logging.WARNING)
    end, runs, right, refused, failed = time.time() + 60 * minutes, 0, 0, 0, 0
    for number in itertools.count():
        if time.time() > end:
            break
        with tempfile.TemporaryDirectory() as folder:
            try:
                count = check(f'{base} {number}', Path(folder))
            except Exception as error:
                failed += 1
                print(f'{base} {number}: {type(error).__name__}: {str(error)[:600]}', flush=True)
                traceback.print_exc(limit=-3)
                continue
        if count is not None:
            runs, right, refused = runs + 1, right + count.right, refused + count.refused
        MMLogger._instance_dict.clear()
    print(f'{runs} runs, {right} answers right, {refused} refused, {failed} runs with a fault')


if __name__ == '__main__':
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
