"""Table and picture of an ablation, from runs.csv: one row for each average, split and epoch."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .paired import LEVEL, MARGIN, bootstrap_interval, holm, summary, t_interval

COLUMNS = ('family', 'schedule', 'seed', 'average', 'split', 'epoch', 'metric', 'value')
METRIC = 'coco/bbox_mAP'
SELECTION, REPORT = SPLITS = ('val', 'test')

# The questions, named before the runs (docs/evidence.md). Each is the mean over seeds of the first
# average minus the second.
PRIMARY = ('hard_40', 'none_40')
REST = (
    ('hard_4', 'none_4'),
    ('range of hard', 'range of none'),
    ('soft_40', 'none_40'),
    ('soft_4', 'none_4'),
    ('schedule_40', 'none_40'),
    ('schedule_4', 'none_4'),
    ('hard_40_bn', 'hard_40'),
    ('hard_4_bn', 'hard_4'),
    ('none_40', 'raw'),
    ('none_4', 'raw'),
    ('hard_4', 'raw'),
    ('mean', 'raw'),
    ('ema', 'raw'),
)
HORIZONS = {'0': 0.1, '4': 4, '20': 20, '40': 40, '60': 60}  # per cent held at the end
RANGES = {f'range of {kind}': [f'{kind}_{name}' for name in HORIZONS] for kind in ('hard', 'none')}


class DataError(ValueError):
    """What is wrong with the data, in one line."""


# Data -------------------------------------------------------------------------------------------


def write_rows(path, rows):
    with open(path, 'w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(COLUMNS)
        writer.writerows(rows)


def read_rows(path):
    """Return the rows of a CSV as tuples, seed and epoch as int and value as float.

    Raises:
        DataError: If a row cannot be used, with its line.
    """
    try:
        with open(path, newline='') as file:
            reader = csv.reader(file)
            header = next(reader, [])
            lines = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f'{path} cannot be read: {error}') from None
    if tuple(header) != COLUMNS:
        raise DataError(f'{path} must have the columns {",".join(COLUMNS)}, got {",".join(header)}')
    return [checked(row, f'{path}, line {number}') for number, row in lines]


def checked(row, where):
    if len(row) != len(COLUMNS):
        raise DataError(f'{where}: {len(COLUMNS)} values belong in a row, got {len(row)}')
    family, schedule, seed, average, split, epoch, metric, value = row
    if split not in SPLITS:
        raise DataError(f'{where}: split must be {SELECTION} or {REPORT}, got {split!r}')
    if metric != METRIC:
        raise DataError(f'{where}: metric must be {METRIC}, got {metric!r}')
    try:
        seed, epoch, number = int(seed), int(epoch), float(value)
    except ValueError:
        raise DataError(f'{where}: seed, epoch and value must be numbers') from None
    if not 0 <= number <= 1:
        raise DataError(f'{where}: mAP must be 0 to 1, got {value}')
    return family, schedule, seed, average, split, epoch, metric, number


@dataclass(frozen=True)
class Setting:
    """All runs of one family and schedule.

    Args:
        family: The detector.
        schedule: Where its learning rate ends.
        seeds: Seeds in order.
        averages: Names in the order of the file.
        epochs: Evaluated epochs in order.
        values: mAP of shape ``(seeds, averages, splits, epochs)``.
    """

    family: str
    schedule: str
    seeds: list
    averages: list
    epochs: list
    values: np.ndarray

    @property
    def name(self):
        return f'{self.family}, {self.schedule}'

    def last(self, average, split=REPORT):
        """Return the mAP of each seed at the last epoch."""
        return self.values[:, self.averages.index(average), SPLITS.index(split), -1]

    def chosen(self, average):
        """Return the mAP of each seed on the report split, at its best epoch on the other one."""
        values = self.values[:, self.averages.index(average)]
        best = values[:, SPLITS.index(SELECTION)].argmax(-1)
        return values[np.arange(len(best)), SPLITS.index(REPORT), best]


def settings_of(rows, path):
    """Return the settings of the rows, in their order.

    Raises:
        DataError: If a value is missing or there twice: the comparisons are paired.
    """
    found = {}
    for family, schedule, seed, average, split, epoch, _, value in rows:
        runs = found.setdefault((family, schedule), {}).setdefault(seed, {})
        if (average, split, epoch) in runs:
            raise DataError(
                f'{path}: seed {seed} of {family}, {schedule} has {average} twice on {split} at '
                f'epoch {epoch}'
            )
        runs[average, split, epoch] = value
    if not found:
        raise DataError(f'{path} has no rows')
    return [setting_of(*about, runs, path) for about, runs in found.items()]


def setting_of(family, schedule, runs, path):
    about = f'{family}, {schedule}'
    averages = sorted({average for run in runs.values() for average, _, _ in run}, key=place_of)
    epochs = sorted({epoch for run in runs.values() for _, _, epoch in run})
    seeds = sorted(runs)
    wanted = [(a, s, e) for a in averages for s in SPLITS for e in epochs]
    for seed in seeds:
        missing = [key for key in wanted if key not in runs[seed]]
        if missing:
            average, split, epoch = missing[0]
            raise DataError(
                f'{path}: seed {seed} of {about} lacks {average} on {split} at epoch {epoch} '
                f'({len(missing)} of {len(wanted)} values are missing); leave the seed out, or '
                'run it again'
            )
    if len(averages) < 2 or 'raw' not in averages:
        raise DataError(f'{path}: {about} needs raw and another average, got {", ".join(averages)}')
    if len(seeds) < 2:
        raise DataError(f'{path}: {about} has one seed, a comparison needs at least 2')
    values = np.array([[runs[seed][key] for key in wanted] for seed in seeds])
    shape = (len(seeds), len(averages), len(SPLITS), len(epochs))
    return Setting(family, schedule, seeds, averages, epochs, values.reshape(shape))


def place_of(average):
    """Return the sort key of an average: raw and ema first, then by kind and number."""
    kind, _, number = average.removesuffix('_bn').partition('_')
    return average != 'raw', average != 'ema', kind, int(number) if number.isdigit() else 0, average


# Comparisons ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One difference between two averages.

    Args:
        name: Both averages.
        primary: Whether this is the question that stands alone.
        last: Differences at the last epoch, for each seed.
        chosen: Differences at the epochs chosen on the selection split.
    """

    name: str
    primary: bool
    last: np.ndarray
    chosen: np.ndarray


def comparisons(setting):
    """Return the comparisons of a setting; without the primary one, each average minus raw."""
    pairs = [pair for pair in (PRIMARY, *REST) if all(known(setting, name) for name in pair)]
    if PRIMARY not in pairs:
        pairs = [(average, 'raw') for average in setting.averages if average != 'raw']
    return [
        Comparison(
            f'{first} − {second}',
            (first, second) == PRIMARY,
            measure(setting, first, setting.last) - measure(setting, second, setting.last),
            measure(setting, first, setting.chosen) - measure(setting, second, setting.chosen),
        )
        for first, second in pairs
    ]


def known(setting, name):
    return all(average in setting.averages for average in RANGES.get(name, [name]))


def measure(setting, name, value):
    """Return one number for each seed: the mAP of an average, or a range over the horizons."""
    if name in RANGES:
        return np.ptp([value(average) for average in RANGES[name]], axis=0)
    return value(name)


def verdict(p, interval, p_equivalence):
    """Return what a comparison says, in a few words."""
    words = []
    if p < LEVEL:
        words.append('higher' if sum(interval) > 0 else 'lower')
    if p_equivalence < LEVEL:
        words.append(f'within ±{100 * MARGIN:g}')
    return ', '.join(words) or 'undecided'


# Report -----------------------------------------------------------------------------------------


def report(folder, failed=()):
    """Write report.md and differences.png beside runs.csv.

    Args:
        folder: Where runs.csv is.
        failed: Lines about runs that failed and are left out. Defaults to none.

    Raises:
        DataError: If runs.csv cannot be used.
    """
    path = Path(folder) / 'runs.csv'
    settings = settings_of(read_rows(path), path)
    text = [
        '# Averages of one run beside each other',
        '',
        'Made from `runs.csv` by `mmema ablate report`. COCO mAP in points (0 to 100) on the '
        f'report split `{REPORT}`, at the last epoch; in columns *chosen* at the epoch that is '
        f'best on the selection split `{SELECTION}`, for each seed and average.',
        '',
    ]
    for setting in settings:
        text += section(setting)
    if failed:
        text += ['## Left out', '', *(f'- {line}' for line in failed), '']
    (Path(folder) / 'report.md').write_text('\n'.join(text))
    draw(Path(folder) / 'differences.png', settings)


def section(setting):
    """Return the lines about one setting."""
    found = comparisons(setting)
    summaries = [summary(comparison.last) for comparison in found]
    adjusted = adjusted_p(found, summaries)
    seeds, epochs = (', '.join(map(str, values)) for values in (setting.seeds, setting.epochs))
    lines = [
        f'## {setting.name}',
        '',
        f'{len(setting.seeds)} seeds ({seeds}), epochs {epochs}.',
        '',
    ]
    rows = [
        (
            f'`{average}`',
            mean_and_std(setting.last(average)),
            mean_and_std(setting.chosen(average)),
            mean_and_std(setting.last(average, SELECTION)),
        )
        for average in setting.averages
    ]
    lines += table(('average', 'mAP ± std', 'chosen', f'last, `{SELECTION}`'), rows)
    rows = [
        (
            f'**{comparison.name}**' if comparison.primary else comparison.name,
            signed(found_here.mean),
            between(found_here.t_interval),
            between(found_here.bootstrap_interval),
            f'{found_here.p_sign_flip:.4f}',
            'alone' if comparison.primary else f'{p:.4f}',
            f'{found_here.p_equivalence:.4f}',
            verdict(p, found_here.t_interval, found_here.p_equivalence),
            f'{signed(comparison.chosen.mean())} {between(t_interval(comparison.chosen))}',
        )
        for comparison, found_here, p in zip(found, summaries, adjusted)
    ]
    header = (
        'difference',
        'mean',
        '95 %, t',
        '95 %, BCa',
        'p, sign flips',
        'p, Holm',
        f'p, {100 * MARGIN:g} or more',
        'verdict',
        'chosen: mean, 95 %',
    )
    lines += table(header, rows)
    if all(known(setting, name) for name in RANGES):
        lines += [ranges(setting), '']
    rows = [(comparison.name, *map(signed, comparison.last)) for comparison in found]
    lines += ['Each seed:', '', *table(('difference', *map(str, setting.seeds)), rows)]
    return lines


def adjusted_p(found, summaries):
    """Return the p values: the primary one as it is, the others by Holm's rule."""
    p = np.array([one.p_sign_flip for one in summaries])
    rest = np.array([not comparison.primary for comparison in found])
    p[rest] = holm(p[rest])
    return p


def ranges(setting):
    """Return a sentence about the range of the mean over the five horizons."""

    def range_of_mean(values, axis):
        return np.ptp(values.mean(axis), axis=0)

    def difference(values, axis):
        hard, none = values[: len(HORIZONS)], values[len(HORIZONS) :]
        return range_of_mean(hard, axis) - range_of_mean(none, axis)

    hard, none = (
        np.array([setting.last(average) for average in RANGES[f'range of {kind}']])
        for kind in ('hard', 'none')
    )
    both = np.concatenate([hard, none])
    return (
        f'Over the five horizons the mean mAP has a range of {points(range_of_mean(none, -1))} '
        f'without restarts and {points(range_of_mean(hard, -1))} with hard ones; the difference '
        f'is {signed(difference(both, -1))}, 95 % (BCa) '
        f'{between(bootstrap_interval(both, difference))}.'
    )


def table(header, rows):
    lines = [header, ['---'] * len(header), *rows]
    return [*(f'| {" | ".join(line)} |' for line in lines), '']


def points(value):
    return f'{100 * value:.2f}'


def signed(value):
    return f'{100 * value:+.2f}'.replace('-', '−')


def between(interval):
    low, high = interval
    return f'[{signed(low)}, {signed(high)}]' if math.isfinite(low + high) else 'none'


def mean_and_std(values):
    return f'{points(values.mean())} ± {points(values.std(ddof=1))}'


# Picture ----------------------------------------------------------------------------------------


def draw(path, settings):
    """Draw the differences of each setting, and the mAP over the horizons below them."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(c.name for setting in settings for c in comparisons(setting)))
    curves = all(known(setting, name) for setting in settings for name in ('raw', *RANGES))
    heights = [0.32 * len(names) + 0.8] + [2.6] * curves
    figure, axes = plt.subplots(
        len(heights),
        len(settings),
        figsize=(2.2 + 3.4 * len(settings), sum(heights) + 0.9),
        squeeze=False,
        sharex='row',
        sharey='row',
        height_ratios=heights,
    )
    for setting, column in zip(settings, axes.T):
        draw_differences(column[0], setting, names)
        if curves:
            draw_horizons(column[1], setting)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    if curves:
        axes[1][0].set_ylabel('mAP above raw, 95 %')
        axes[1][0].legend(fontsize=8)
    figure.tight_layout()
    partial = Path(f'{path}.partial')
    figure.savefig(partial, dpi=120, format='png')
    plt.close(figure)
    os.replace(partial, path)


def draw_differences(axis, setting, names):
    axis.axvspan(-100 * MARGIN, 100 * MARGIN, color='0.92', zorder=0)
    axis.axvline(0, color='0.5', lw=1, zorder=1)
    for comparison in comparisons(setting):
        row = names.index(comparison.name)
        values = 100 * comparison.last
        low, high = t_interval(values)
        colour = 'tab:red' if comparison.primary else 'tab:blue'
        axis.plot(values, [row + 0.18] * len(values), '.', color='0.55', ms=4, zorder=2)
        axis.plot([low, high], [row - 0.08] * 2, color=colour, lw=2, zorder=3)
        axis.plot(values.mean(), row - 0.08, 'o', color=colour, ms=5, zorder=4)
    axis.set_title(f'{setting.name}\n{len(setting.seeds)} seeds', fontsize=10)
    axis.set_xlabel('difference in mAP; grey: less than 0.5', fontsize=9)
    axis.grid(axis='x', alpha=0.3)


def draw_horizons(axis, setting):
    raw = setting.last('raw')
    axis.axhline(0, color='tab:orange', ls='--', label='raw')
    for (name, averages), colour, offset in zip(
        reversed(RANGES.items()), ('tab:blue', 'tab:red'), (-0.06, 0.06)
    ):
        values = [100 * (setting.last(average) - raw) for average in averages]
        places = np.arange(len(values)) + offset
        intervals = np.array([t_interval(value) for value in values])
        means = np.array([value.mean() for value in values])
        axis.errorbar(
            places,
            means,
            np.abs(intervals.T - means),
            marker='o',
            ms=4,
            capsize=2,
            color=colour,
            label='no restart' if name == 'range of none' else 'hard restart',
        )
    axis.set_xticks(range(len(HORIZONS)), [f'{share:g}' for share in HORIZONS.values()])
    axis.set_xlabel('horizon, as % held from before the switch', fontsize=9)
    axis.grid(alpha=0.3)
