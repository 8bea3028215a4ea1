"""The two files of an ablation's folder, and what they hold for each family and schedule.

runs.csv has one row for each average, split and epoch; questions.json the comparisons of each
setting, as `ablation` of its config asks for them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..run.metrics import less_is_better

COLUMNS = ('family', 'schedule', 'seed', 'average', 'split', 'epoch', 'metric', 'value')
SELECTION, REPORT = SPLITS = ('val', 'test')
RUNS, QUESTIONS = 'runs.csv', 'questions.json'


class DataError(ValueError):
    """What is wrong with the data or the questions, in one line."""


# Questions --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """Comparisons that are asked for; each is the mean over seeds of the first minus the second.

    Args:
        primary: The pair of names that stands alone, without a correction. Defaults to none.
        contrasts: Pairs that are corrected for their number together. Defaults to each average and
            raw, and each other average and ema.
        ranges: Names for the difference between the highest and the lowest of several averages,
            which are named by short labels. Contrasts may name a range in the place of an average.
        over: What the labels of the ranges are, for the picture.
        margin: A difference in points that does not matter. Defaults to half a point.
        rule: 'greater' or 'less': which values are better. Defaults to what MMEngine knows.
    """

    primary: tuple = ()
    contrasts: tuple = ()
    ranges: dict = field(default_factory=dict)
    over: str = ''
    margin: float = 0.5
    rule: str = None

    def pairs(self, averages):
        """Return all pairs, the primary one first; raise DataError if a name is unknown."""
        pairs = [tuple(pair) for pair in (self.primary, *self.contrasts) if pair]
        if not pairs:
            pairs = [(one, 'raw') for one in averages if one != 'raw']
            others = [one for one in averages if one not in ('raw', 'ema')]
            pairs += [(one, 'ema') for one in others if 'ema' in averages]
        for pair in pairs:
            if len(pair) != 2:
                raise DataError(f'a contrast must be a pair of names, got {", ".join(pair)}')
        named = [name for pair in pairs for name in pair if name not in self.ranges]
        named += [name for members in self.ranges.values() for name in members.values()]
        unknown = [name for name in named if name not in averages]
        if unknown:
            raise DataError(
                f'contrasts and ranges must name averages of the run ({", ".join(averages)}), '
                f'got {unknown[0]!r}'
            )
        return pairs


ASKED = tuple(vars(Questions()))


def questions_in(ablation):
    """Return the :class:`Questions` in the settings ``ablation`` of a config."""
    return Questions(**{key: ablation[key] for key in ASKED if key in ablation})


def read_questions(folder):
    """Return the questions of a folder by family and schedule; none if it has no file of them.

    Raises:
        DataError: If the file cannot be used.
    """
    path = Path(folder) / QUESTIONS
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        return {(one.pop('family'), one.pop('schedule')): Questions(**one) for one in found}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path} cannot be used: {error}') from None


def write_questions(folder, questions):
    found = [
        dict(family=family, schedule=schedule, **vars(own))
        for (family, schedule), own in questions.items()
    ]
    text = ',\n'.join(json.dumps(one, ensure_ascii=False) for one in found)
    write_whole(Path(folder) / QUESTIONS, f'[\n{text}\n]\n')


def write_whole(path, text):
    partial = Path(f'{path}.partial')
    partial.write_text(text)
    os.replace(partial, path)


# Data -------------------------------------------------------------------------------------------


def write_rows(path, rows):
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([COLUMNS, *rows])
    write_whole(path, text.getvalue())


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
    try:
        seed, epoch, number = int(seed), int(epoch), float(value)
    except ValueError:
        raise DataError(f'{where}: seed, epoch and value must be numbers') from None
    if not math.isfinite(number):
        raise DataError(f'{where}: value must be finite, got {value}')
    return family, schedule, seed, average, split, epoch, metric, number


@dataclass(frozen=True)
class Setting:
    """All runs of one family and schedule.

    Args:
        family: The model.
        schedule: What else tells its runs from those of other settings.
        metric: The name of the metric.
        seeds: Seeds in order.
        averages: Names in order.
        epochs: Evaluated epochs in order.
        values: The metric of shape ``(seeds, averages, splits, epochs)``.
        questions: What is compared.
    """

    family: str
    schedule: str
    metric: str
    seeds: list
    averages: list
    epochs: list
    values: np.ndarray
    questions: Questions

    @property
    def name(self):
        return f'{self.family}, {self.schedule}'

    @property
    def scale(self):
        """How many points a metric of 1 is: 100 if all values are from 0 to 1, else 1."""
        return 100 if self.values.min() >= 0 and self.values.max() <= 1 else 1

    @property
    def margin(self):
        """A difference of the metric that does not matter."""
        return self.questions.margin / self.scale

    def last(self, average, split=REPORT):
        """Return the metric of each seed at the last epoch."""
        return self.values[:, self.averages.index(average), SPLITS.index(split), -1]

    def chosen(self, average):
        """Return the metric of each seed on the report split, at its best epoch on the other."""
        values = self.values[:, self.averages.index(average)]
        less = less_is_better(self.metric, self.questions.rule)
        best = (-values if less else values)[:, SPLITS.index(SELECTION)].argmax(-1)
        return values[np.arange(len(best)), SPLITS.index(REPORT), best]


def read_settings(folder):
    """Return the settings in the files of a folder, in the order of the rows.

    Raises:
        DataError: If a file cannot be used, or a value is missing or there twice: the comparisons
            are paired.
    """
    path, found = Path(folder) / RUNS, {}
    for family, schedule, seed, average, split, epoch, metric, value in read_rows(path):
        metrics, runs = found.setdefault((family, schedule), (set(), {}))
        metrics.add(metric)
        values = runs.setdefault(seed, {})
        if (average, split, epoch) in values:
            raise DataError(
                f'{path}: seed {seed} of {family}, {schedule} has {average} twice on {split} at '
                f'epoch {epoch}'
            )
        values[average, split, epoch] = value
    if not found:
        raise DataError(f'{path} has no rows')
    questions = read_questions(folder)
    return [
        setting_of(*about, metrics, runs, questions.get(about, Questions()), path)
        for about, (metrics, runs) in found.items()
    ]


def setting_of(family, schedule, metrics, runs, questions, path):
    about = f'{path}: {family}, {schedule}'
    averages = sorted({average for run in runs.values() for average, _, _ in run}, key=place_of)
    epochs = sorted({epoch for run in runs.values() for _, _, epoch in run})
    seeds = sorted(runs)
    wanted = [(a, s, e) for a in averages for s in SPLITS for e in epochs]
    for seed in seeds:
        missing = [key for key in wanted if key not in runs[seed]]
        if missing:
            average, split, epoch = missing[0]
            raise DataError(
                f'{path}: seed {seed} of {family}, {schedule} lacks {average} on {split} at epoch '
                f'{epoch} ({len(missing)} of {len(wanted)} values are missing); leave the seed '
                'out, or run it again'
            )
    if len(metrics) > 1:
        raise DataError(f'{about} must have one metric, got {", ".join(sorted(metrics))}')
    if len(averages) < 2 or 'raw' not in averages:
        raise DataError(f'{about} needs raw and another average, got {", ".join(averages)}')
    if len(seeds) < 2:
        raise DataError(f'{about} has one seed, a comparison needs at least 2')
    if less_is_better(*metrics, questions.rule) is None:
        raise DataError(
            f"{about}: rule must be 'greater' or 'less', got {questions.rule}: which values of "
            f'{", ".join(metrics)} are better? Set it in `ablation` of the config or in {QUESTIONS}'
        )
    questions.pairs(averages)
    values = np.array([[runs[seed][key] for key in wanted] for seed in seeds])
    values = values.reshape(len(seeds), len(averages), len(SPLITS), len(epochs))
    return Setting(family, schedule, *metrics, seeds, averages, epochs, values, questions)


def place_of(average):
    """Return the sort key of an average: raw and ema first, then by name and the numbers in it."""
    parts = [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', average)]
    return average != 'raw', average != 'ema', parts
