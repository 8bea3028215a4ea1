"""Table and picture of an ablation, from the two files of its folder."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from .ablation_data import REPORT, SELECTION, read_settings, write_whole
from .paired import LEVEL, holm, summary, t_interval

# Comparisons ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One difference between two averages, or two ranges of averages.

    Args:
        pair: The names of both.
        primary: Whether this is the question that stands alone.
        last: Differences at the last epoch, for each seed.
        chosen: Differences at the epochs chosen on the selection split.
    """

    pair: tuple
    primary: bool
    last: np.ndarray
    chosen: np.ndarray

    @property
    def name(self):
        return ' − '.join(self.pair)


def comparisons(setting):
    """Return the comparisons of a setting."""
    asked = setting.questions
    return [
        Comparison(
            pair,
            pair == tuple(asked.primary),
            difference(setting, pair, setting.last),
            difference(setting, pair, setting.chosen),
        )
        for pair in asked.pairs(setting.averages)
    ]


def difference(setting, pair, value):
    first, second = (measure(setting, name, value) for name in pair)
    return first - second


def measure(setting, name, value):
    """Return one number for each seed: the metric of an average, or a range of several."""
    members = setting.questions.ranges.get(name)
    return np.ptp([value(one) for one in members.values()], axis=0) if members else value(name)


def verdict(p, interval, p_equivalence, margin):
    """Return what a comparison says, in a few words."""
    words = []
    if p < LEVEL:
        words.append('higher' if sum(interval) > 0 else 'lower')
    if p_equivalence < LEVEL:
        words.append(f'within ±{margin:g}')
    return ', '.join(words) or 'undecided'


# Report -----------------------------------------------------------------------------------------


def report(folder, failed=()):
    """Write report.md and differences.png beside runs.csv.

    Args:
        folder: Where runs.csv is, and questions.json if there are any.
        failed: Lines about runs that failed and are left out. Defaults to none.

    Raises:
        DataError: If the files cannot be used.
    """
    settings = read_settings(folder)
    text = [
        '# Averages of one run beside each other',
        '',
        'Made from `runs.csv` and `questions.json` by `mmema ablate report`. Values of the report '
        f'split `{REPORT}`, at the last epoch; in columns *chosen* at the epoch that is best on '
        f'the selection split `{SELECTION}`, for each seed and average. A metric from 0 to 1 is in '
        'points, from 0 to 100.',
        '',
    ]
    for setting in settings:
        text += section(setting)
    if failed:
        text += ['## Left out', '', *(f'- {line}' for line in failed), '']
    write_whole(Path(folder) / 'report.md', '\n'.join(text))
    draw(Path(folder) / 'differences.png', settings)


def section(setting):
    """Return the lines about one setting."""
    found, margin, show = comparisons(setting), setting.questions.margin, Points(setting.scale)
    summaries = [summary(comparison.last, setting.margin) for comparison in found]
    adjusted = adjusted_p(found, summaries)
    seeds, epochs = (', '.join(map(str, values)) for values in (setting.seeds, setting.epochs))
    lines = [
        f'## {setting.name}',
        '',
        f'`{setting.metric}`, {len(setting.seeds)} seeds ({seeds}), epochs {epochs}.',
        '',
    ]
    rows = [
        (
            f'`{average}`',
            show.mean_and_std(setting.last(average)),
            show.mean_and_std(setting.chosen(average)),
            show.mean_and_std(setting.last(average, SELECTION)),
        )
        for average in setting.averages
    ]
    lines += table(('average', 'mean ± std', 'chosen', f'last, `{SELECTION}`'), rows)
    rows = [
        (
            f'**{comparison.name}**' if comparison.primary else comparison.name,
            show.signed(found_here.mean),
            show.between(found_here.t_interval),
            show.between(found_here.bootstrap_interval),
            f'{found_here.p_sign_flip:.4f}',
            'alone' if comparison.primary else f'{p:.4f}',
            f'{found_here.p_equivalence:.4f}',
            verdict(p, found_here.t_interval, found_here.p_equivalence, margin),
            f'{show.signed(comparison.chosen.mean())} '
            f'{show.between(t_interval(comparison.chosen))}',
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
        f'p, {margin:g} or more',
        'verdict',
        'chosen: mean, 95 %',
    )
    lines += table(header, rows)
    rows = [(comparison.name, *map(show.signed, comparison.last)) for comparison in found]
    lines += ['Each seed:', '', *table(('difference', *map(str, setting.seeds)), rows)]
    return lines


def adjusted_p(found, summaries):
    """Return the p values: the primary one as it is, the others by Holm's rule."""
    p = np.array([one.p_sign_flip for one in summaries])
    rest = np.array([not comparison.primary for comparison in found])
    p[rest] = holm(p[rest])
    return p


def table(header, rows):
    lines = [header, ['---'] * len(header), *rows]
    return [*(f'| {" | ".join(line)} |' for line in lines), '']


@dataclass(frozen=True)
class Points:
    """Values of a metric as text, in points: so many for a metric of 1."""

    scale: int

    def plain(self, value):
        return f'{self.scale * value:.2f}'

    def signed(self, value):
        return f'{self.scale * value:+.2f}'.replace('-', '−')

    def between(self, interval):
        low, high = map(self.signed, interval)
        return f'[{low}, {high}]' if math.isfinite(sum(interval)) else 'none'

    def mean_and_std(self, values):
        return f'{self.plain(values.mean())} ± {self.plain(values.std(ddof=1))}'


# Picture ----------------------------------------------------------------------------------------


def draw(path, settings):
    """Draw the differences of each setting, and below them the averages of its ranges."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    found = [comparisons(setting) for setting in settings]
    names = list(dict.fromkeys(comparison.name for own in found for comparison in own))
    curves = all(setting.questions.ranges for setting in settings)
    heights = [0.32 * len(names) + 0.8] + [2.6] * curves
    figure, axes = plt.subplots(
        len(heights),
        len(settings),
        figsize=(2.2 + 3.4 * len(settings), sum(heights) + 0.9),
        squeeze=False,
        sharex='row',
        sharey='row',
        gridspec_kw=dict(height_ratios=heights),
    )
    for setting, own, column in zip(settings, found, axes.T):
        draw_differences(column[0], setting, own, names)
        if curves:
            draw_ranges(column[1], setting)
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].set_ylim(len(names) - 0.5, -0.5)
    if curves:
        axes[1][0].set_ylabel('above raw, 95 %')
        axes[1][0].legend(fontsize=8)
    figure.tight_layout()
    partial = Path(f'{path}.partial')
    figure.savefig(partial, dpi=120, format='png')
    plt.close(figure)
    os.replace(partial, path)


def draw_differences(axis, setting, found, names):
    margin = setting.questions.margin
    axis.axvspan(-margin, margin, color='0.92', zorder=0)
    axis.axvline(0, color='0.5', lw=1, zorder=1)
    for comparison in found:
        row = names.index(comparison.name)
        values = setting.scale * comparison.last
        low, high = t_interval(values)
        colour = 'tab:red' if comparison.primary else 'tab:blue'
        axis.plot(values, [row + 0.18] * len(values), '.', color='0.55', ms=4, zorder=2)
        axis.plot([low, high], [row - 0.08] * 2, color=colour, lw=2, zorder=3)
        axis.plot(values.mean(), row - 0.08, 'o', color=colour, ms=5, zorder=4)
    axis.set_title(f'{setting.name}\n{len(setting.seeds)} seeds', fontsize=10)
    metric = setting.metric.rsplit('/', 1)[-1]
    axis.set_xlabel(f'difference in {metric}; grey: less than {margin:g}', fontsize=9)
    axis.grid(axis='x', alpha=0.3)


def draw_ranges(axis, setting):
    """Draw the averages of each range above raw, with their intervals, side by side."""
    axis.axhline(0, color='tab:orange', ls='--', label='raw')
    ranges = setting.questions.ranges
    labels = list(dict.fromkeys(label for members in ranges.values() for label in members))
    offsets = 0.12 * (np.arange(len(ranges)) - (len(ranges) - 1) / 2)
    colours = cycle(('tab:red', 'tab:blue', 'tab:green', 'tab:purple'))
    for (name, members), offset, colour in zip(ranges.items(), offsets, colours):
        values = [
            setting.scale * (setting.last(average) - setting.last('raw'))
            for average in members.values()
        ]
        intervals = np.array([t_interval(value) for value in values])
        means = np.array([value.mean() for value in values])
        axis.errorbar(
            [labels.index(label) + offset for label in members],
            means,
            np.abs(intervals.T - means),
            marker='o',
            ms=4,
            capsize=2,
            color=colour,
            label=name,
        )
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlabel(setting.questions.over, fontsize=9)
    axis.grid(alpha=0.3)
