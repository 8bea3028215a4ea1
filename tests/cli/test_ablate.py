"""mmema ablate: statistics by hand, the report from a small CSV, refusals, and real runs."""

import json
import math
import os
import re
import shutil
import signal
import time
from copy import deepcopy
from types import SimpleNamespace

import forks
import make_digits
import pytest
import torch
import toy_config
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tool_runs import ROOT, call_forked, call_here, refusal

from mmema.checkpoints.files import load
from mmema.cli import ablate, ablation_data, ablation_run, paired
from mmema.cli import ablation_report as reporting

pytest.importorskip('mmyolo')

CONFIG = ROOT / 'configs' / 'digits' / 'yolov5_n_ablation.py'
CONFIGS = sorted(path.stem for path in CONFIG.parent.glob('*_ablation*.py'))


# --- statistics ---------------------------------------------------------------------------------


def test_t_interval():
    # Mean 0; standard error 0.001 / sqrt(3); the 97.5 % point of t with 2 degrees is 4.302653.
    half = 4.302653 * 0.001 / math.sqrt(3)
    assert paired.t_interval([-0.001, 0, 0.001]) == pytest.approx((-half, half), rel=1e-6)
    # The five seeds of the digits: 0.0074 +- 2.776445 * 0.0043359 / sqrt(5).
    low, high = paired.t_interval([0.006, 0.004, 0.006, 0.006, 0.015])
    assert (low, high) == pytest.approx((0.002016, 0.012784), abs=1e-6)


@pytest.mark.parametrize(
    ('values', 'p'),
    [
        ([1, 2, 3], 2 / 8),  # of the 8 sums only +6 and -6 are as far out
        ([3, 1, -2], 6 / 8),  # +-2, +-4 and +-6, but not the two zeros
        ([5, 5], 2 / 4),
        (range(1, 13), 2 / 2**12),
        ([0, 0, 0], 1),
    ],
)
def test_sign_flips(values, p):
    assert paired.sign_flip(list(values)) == pytest.approx(p)


def test_holm():
    # 3 * 0.01; 2 * 0.03; then 1 * 0.04, but not below the one before.
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.5, 0.6]) == pytest.approx([1, 1])
    assert len(paired.holm([])) == 0


def test_equivalence():
    # On both sides t = 0.005 sqrt(3) / 0.001; with 2 degrees P(T > t) = 1/2 - t / sqrt(4 t^2 + 8).
    t = 5 * math.sqrt(3)
    p = 0.5 - t / math.sqrt(4 * t * t + 8)
    assert paired.equivalence([-0.001, 0, 0.001], 0.005) == pytest.approx(p, rel=1e-6)
    # On the margin half of the samples would be further out.
    assert paired.equivalence([0.004, 0.005, 0.006], 0.005) == pytest.approx(0.5)
    assert paired.equivalence([-0.004, -0.005, -0.006], 0.005) == pytest.approx(0.5)


def test_bootstrap():
    low, high = paired.bootstrap_interval([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    # Means of six draws, k / 6: P(k <= 0) = 1.6 %, P(k <= 1) = 10.9 %.
    assert (low, high) == pytest.approx((1 / 6, 5 / 6), abs=1e-9)
    # A long tail to the right. The mean is 2 k, k binomial (6, 1/6). BCa's upper end is its 99.8 %
    # point, 8; the plain percentile's is 6. z0 = 0.09, from P(k < 1) = 0.33 and P(k <= 1) = 0.74;
    # a = 7.68 / (6 * 4.8 ** 1.5) = 0.12, from five jackknife means of 2.4 and one of 0.
    assert paired.bootstrap_interval([0.0] * 5 + [12.0]) == pytest.approx((0, 8))


def test_no_spread_is_no_error():
    found = paired.summary([0.01, 0.01, 0.01], 0.005)
    assert found.t_interval == found.bootstrap_interval == (0.01, 0.01)
    assert (found.p_sign_flip, found.p_equivalence) == (0.25, 1)
    assert paired.summary([0.0, 0.0], 0.005).p_equivalence == 0


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match='needs at least 2 seeds, got 1'):
        paired.summary([0.1], 0.005)


# --- the report ---------------------------------------------------------------------------------

METRIC = 'coco/bbox_mAP'

# mAP in points of three seeds, on val and test, at epochs 2 and 4.
SMALL = {
    'raw': ([[50, 51], [50, 52], [50, 53]], [[40, 41], [40, 42], [40, 43]]),
    # Seed 1 has its best epoch on val at 2, seed 2 both alike: the earlier one is taken.
    'none_40': ([[60, 55], [55, 55], [50, 60]], [[45, 44], [45, 44], [45, 44]]),
    'hard_40': ([[50, 60], [50, 60], [50, 60]], [[30, 45], [30, 46], [30, 47]]),
}


def small_rows(schedule='flat', metric=METRIC, scale=100):
    return [
        ('toy', schedule, seed, average, split, epoch, metric, value / scale)
        for average, splits in SMALL.items()
        for split, seeds in zip(ablation_data.SPLITS, splits)
        for seed, values in enumerate(seeds, 1)
        for epoch, value in zip((2, 4), values)
    ]


def table_in(text, first):
    """Return the rows of the table whose header begins with ``first``, as lists of cells."""
    lines = text[text.index(f'| {first} |') :].split('\n\n')[0].splitlines()
    return [line.strip('| ').split(' | ') for line in lines if '---' not in line]


def write(folder, rows, schedules=('flat',), **questions):
    """Write both files of an ablation."""
    ablation_data.write_rows(folder / 'runs.csv', rows)
    asked = ablation_data.Questions(**questions)
    ablation_data.write_questions(folder, {('toy', each): asked for each in schedules})


@pytest.fixture
def small(tmp_path):
    write(
        tmp_path,
        small_rows(),
        primary=('hard_40', 'none_40'),
        contrasts=[('none_40', 'raw')],
    )
    return tmp_path


def test_report_from_a_small_csv(small, capsys):
    call_here('ablate', 'report', small, folder=small)
    assert capsys.readouterr().out.split() == [
        str(small / name) for name in ('report.md', 'differences.png')
    ]
    text = (small / 'report.md').read_text()
    assert '3 seeds (1, 2, 3), epochs 2, 4.' in text
    assert table_in(text, 'average')[1:] == [
        ['`raw`', '42.00 ± 1.00', '42.00 ± 1.00', '52.00 ± 1.00'],
        ['`hard_40`', '46.00 ± 1.00', '46.00 ± 1.00', '60.00 ± 0.00'],
        ['`none_40`', '44.00 ± 0.00', '44.67 ± 0.58', '56.67 ± 2.89'],
    ]
    header, primary, raw = table_in(text, 'difference')
    # Differences 1, 2, 3 at the end; 0, 1, 3 at the chosen epochs.
    row = dict(zip(header, primary))
    assert row['difference'] == '**hard_40 − none_40**'
    assert row['mean'] == '+2.00'
    assert row['95 %, t'] == '[−0.48, +4.48]'  # 2 +- 4.302653 / sqrt(3)
    assert (row['p, sign flips'], row['p, Holm']) == ('0.2500', 'alone')
    assert row['verdict'] == 'undecided'
    assert row['chosen: mean, 95 %'].startswith('+1.33 ')
    row = dict(zip(header, raw))
    assert (row['difference'], row['mean'], row['p, Holm']) == ('none_40 − raw', '+2.00', '0.2500')
    seeds = table_in(text[text.index('Each seed') :], 'difference')
    assert seeds[:2] == [
        ['difference', '1', '2', '3'],
        ['hard_40 − none_40', '+1.00', '+2.00', '+3.00'],
    ]
    assert (small / 'differences.png').read_bytes()[:4] == b'\x89PNG'


def test_the_published_report_is_that_of_the_published_data(tmp_path):
    published = ROOT / 'docs' / 'evidence'
    for name in ('runs.csv', 'questions.json'):
        shutil.copy(published / name, tmp_path)
    reporting.report(tmp_path)
    assert (tmp_path / 'report.md').read_text() == (published / 'report.md').read_text()
    settings = ablation_data.read_settings(published)
    assert {setting.name: len(setting.seeds) for setting in settings} == {
        'YOLOv5-n, to 1 %': 12,
        'YOLOv5-n, to a fifth': 6,
        'RTMDet-tiny, to 1 %': 6,
        'RTMDet-tiny, to a fifth': 6,
    }
    (primary, second, *_) = reporting.comparisons(settings[0])
    # The figures in README and docs/evidence.md.
    assert primary.last.mean() == pytest.approx(0.048, abs=5e-4)
    assert (primary.last > 0).all()
    assert reporting.t_interval(primary.last) == pytest.approx((0.041, 0.0545), abs=5e-4)
    assert second.last.mean() == pytest.approx(-0.0026, abs=5e-5)
    (primary, second, *_) = reporting.comparisons(settings[2])
    assert (primary.last > 0).all()
    assert reporting.t_interval(primary.last) == pytest.approx((0.102, 0.177), abs=5e-4)
    assert second.last.mean() == pytest.approx(0.0035, abs=5e-5)


def test_ranges_over_the_horizons(tmp_path):
    # Two seeds; at the five horizons none has 40 to 44 and 40 to 46, hard is flat but for one.
    horizons = ('0', '4', '20', '40', '60')
    none = dict(zip(horizons, ([40, 40], [41, 42], [42, 44], [43, 45], [44, 46])))
    hard = dict(zip(horizons, ([43, 43], [43, 43], [43, 43], [43, 43], [44, 45])))
    rows = [
        ('toy', 'flat', seed, average, split, 4, METRIC, values[seed] / 100)
        for average, values in (
            ('raw', [40, 40]),
            *((f'none_{name}', values) for name, values in none.items()),
            *((f'hard_{name}', values) for name, values in hard.items()),
        )
        for split in ablation_data.SPLITS
        for seed in (0, 1)
    ]
    write(
        tmp_path,
        rows,
        contrasts=[('range of hard', 'range of none')],
        ranges={f'range of {k}': {h: f'{k}_{h}' for h in horizons} for k in ('none', 'hard')},
    )
    reporting.report(tmp_path)
    text = (tmp_path / 'report.md').read_text()
    # Ranges of each seed: 4 and 6 without, 1 and 2 with.
    assert ['range of hard − range of none', '−3.00', '−4.00'] in table_in(
        text[text.index('Each seed') :], 'difference'
    )


def test_without_questions_each_average_is_compared_with_raw_and_the_main_one(tmp_path):
    rows = small_rows() + [
        (*row[:3], 'ema', *row[4:]) for row in small_rows() if row[3] == 'none_40'
    ]
    ablation_data.write_rows(tmp_path / 'runs.csv', rows)
    reporting.report(tmp_path)
    names = [row[0] for row in table_in((tmp_path / 'report.md').read_text(), 'difference')]
    assert names[1:] == [
        'ema − raw',
        'hard_40 − raw',
        'none_40 − raw',
        'hard_40 − ema',
        'none_40 − ema',
    ]


def test_a_metric_in_percent_of_which_less_is_better(tmp_path):
    """Points are its own; the chosen epoch is that of the lowest value."""
    write(
        tmp_path,
        small_rows(metric='error', scale=1),
        contrasts=[('none_40', 'raw')],
        margin=10,
        rule='less',
    )
    reporting.report(tmp_path)
    text = (tmp_path / 'report.md').read_text()
    assert '`error`, 3 seeds (1, 2, 3)' in text
    # Lowest on val: seed 1 at epoch 4, seed 2 both alike, so the earlier one, seed 3 at epoch 2.
    rows = {row[0]: row[1:3] for row in table_in(text, 'average')}
    assert rows['`none_40`'] == ['44.00 ± 0.00', '44.67 ± 0.58']
    assert rows['`raw`'] == ['42.00 ± 1.00', '40.00 ± 0.00']
    (row,) = table_in(text, 'difference')[1:]
    assert row[1] == '+2.00' and row[-2] == 'within ±10'


def test_several_settings_and_what_failed(tmp_path):
    write(tmp_path, small_rows() + small_rows('steep'), contrasts=[('none_40', 'raw')])
    reporting.report(tmp_path, ['toy, seed 7: no more disk'])
    text = (tmp_path / 'report.md').read_text()
    assert re.findall('^## (.*)', text, re.M) == ['toy, flat', 'toy, steep', 'Left out']
    assert text.endswith('- toy, seed 7: no more disk\n')


@pytest.mark.parametrize(
    ('p', 'interval', 'p_equivalence', 'words'),
    [
        (0.01, (0.1, 0.3), 0.2, 'higher'),
        (0.01, (-0.3, -0.1), 0.01, 'lower, within ±0.5'),
        (0.2, (-0.1, 0.1), 0.01, 'within ±0.5'),
        (0.2, (-0.1, 0.1), 0.2, 'undecided'),
    ],
)
def test_verdicts(p, interval, p_equivalence, words):
    assert reporting.verdict(p, interval, p_equivalence, 0.5) == words


# --- refusals -----------------------------------------------------------------------------------


def changed(change):
    """Return the lines of the small CSV after a change."""
    lines = ['family,schedule,seed,average,split,epoch,metric,value']
    lines += [','.join(map(str, row)) for row in small_rows()]
    change(lines)
    return '\n'.join(lines) + '\n'


def keep(words):
    """Return a change that leaves the header and the rows with the words."""

    def change(lines):
        lines[1:] = [line for line in lines[1:] if words in line]

    return change


def everywhere(old, new):
    def change(lines):
        lines[1:] = [line.replace(old, new) for line in lines[1:]]

    return change


def replace(number, old, new):
    def change(lines):
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new)

    return change


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (replace(1, ',val,', ',eval,'), "line 2: split must be val or test, got 'eval'"),
        (replace(0, 'seed', 'sead'), 'must have the columns family,schedule,seed'),
        (replace(1, 'coco/', 'voc/'), 'must have one metric, got coco/bbox_mAP, voc/bbox_mAP'),
        (replace(3, ',0.5', ',nan'), 'line 4: value must be finite, got nan'),
        (replace(3, ',0.5', ',high'), 'line 4: seed, epoch and value must be numbers'),
        (replace(3, ',0.5', ''), 'line 4: 8 values belong in a row, got 7'),
        (
            lambda lines: lines.append(lines[1]),
            'seed 1 of toy, flat has raw twice on val at epoch 2',
        ),
        (
            # Seed 2 lacks one average on the report split.
            lambda lines: lines.remove('toy,flat,2,hard_40,test,4,coco/bbox_mAP,0.46'),
            'seed 2 of toy, flat lacks hard_40 on test at epoch 4 (1 of 12 values are missing)',
        ),
        (keep(',test,'), 'seed 1 of toy, flat lacks raw on val at epoch 2'),
        (keep('flat,2,'), 'toy, flat has one seed, a comparison needs at least 2'),
        (
            lambda lines: lines.__setitem__(
                slice(1, None), [s.replace(METRIC, 'x') for s in lines[1:]]
            ),
            "rule must be 'greater' or 'less', got None: which values of x are better?",
        ),
        (keep('raw'), 'toy, flat needs raw and another average, got raw'),
        (keep('nothing'), 'has no rows'),
    ],
)
def test_refuses_a_csv(tmp_path, change, reason):
    (tmp_path / 'runs.csv').write_text(changed(change))
    assert reason in refusal('ablate', 'report', '.', folder=tmp_path)
    assert not (tmp_path / 'report.md').exists()


@pytest.mark.parametrize(
    ('text', 'reason'),
    [
        ('[', 'questions.json cannot be used: Expecting value'),
        ('[{"family": "toy"}]', "questions.json cannot be used: 'schedule'"),
        ('[{"family": "toy", "schedule": "flat", "x": 1}]', "unexpected keyword argument 'x'"),
        (
            '[{"family": "toy", "schedule": "flat", "primary": ["hard_40", "soft"]}]',
            "must name averages of the run (raw, hard_40, none_40), got 'soft'",
        ),
        (
            '[{"family": "toy", "schedule": "flat", "contrasts": [["raw"]]}]',
            'a contrast must be a pair of names, got raw',
        ),
    ],
)
def test_refuses_questions(small, text, reason):
    (small / 'questions.json').write_text(text)
    assert reason in refusal('ablate', 'report', '.', folder=small)


def test_refuses_a_folder_without_a_csv(tmp_path):
    assert 'runs.csv cannot be read' in refusal('ablate', 'report', 'none', folder=tmp_path)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits') / 'set'
    make_digits.make_digits(folder, train=8, val=4, test=6)
    return folder


def small_run(data):
    """Return options that make an ablation config a run of seconds on the few pictures of data."""
    options = {f'{split}_dataloader.dataset.data_root': data for split in ('train', 'val', 'test')}
    options.update(
        {f'{s}_evaluator.ann_file': data / 'annotations' / f'{s}.json' for s in ('val', 'test')}
    )
    options.update(
        {
            'train_dataloader.batch_size': 4,
            'train_cfg.max_epochs': 3,
            'custom_hooks.1.switch_epoch': 1,
            'default_hooks.checkpoint.interval': 1,
            'default_hooks.checkpoint.max_keep_ckpts': 2,
        }
    )
    return ['--cfg-options', *(f'{key}={value}' for key, value in options.items())]


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        (['none.py'], 'no config file none.py'),
        ([CONFIG, '--seeds', '1'], '--seeds must be at least 2, got 1'),
        ([CONFIG, '--jobs', '0'], '--jobs must be at least 1, got 0'),
        ([CONFIG, '--first-seed', '-1'], '--first-seed must be at least 0, got -1'),
        ([CONFIG, '--cfg-options', 'x'], 'takes key=value'),
    ],
)
def test_refuses_before_it_imports_the_libraries(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.setattr(ablate.cli, 'import_libraries', pytest.fail)
    assert reason in refusal('ablate', *arguments, '--out', 'out', folder=tmp_path)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('config', 'options', 'reason'),
    [
        ('yolov5_n_digits', [], 'no EMAHook with averages in `also`'),
        ('yolov5_n_ablation', ['test_evaluator.ann_file={data}/annotations/val.json'], 'both read'),
        ('yolov5_n_ablation', ['test_evaluator.ann_file=none.json'], 'annotations of COCO, got'),
        ('yolov5_n_ablation', ['test_dataloader=None'], 'has no test_dataloader'),
        ('yolov5_n_ablation', ['ablation.recalibrate.x=hard_5'], "got x='hard_5'"),
        ('yolov5_n_ablation', ['ablation.contrast=x'], 'ablation has no contrast; it has primary'),
        ('yolov5_n_ablation', ['ablation.primary=(ema,x)'], 'of the run (raw, ema, none_0, none_4'),
        ('yolov5_n_ablation', ['ablation.recalibrate.mean=hard_4'], "got mean='hard_4'"),
    ],
)
def test_refuses_a_config(tmp_path, data, config, options, reason):
    call = [ROOT / 'configs' / 'digits' / f'{config}.py', '--out', 'out', *small_run(data)]
    call += [option.format(data=data) for option in options]
    assert reason in refusal('ablate', *call, folder=tmp_path)
    assert not (tmp_path / 'out').exists()


def test_refuses_other_settings_in_one_folder(tmp_path, data):
    config = Config.fromfile(CONFIG)
    first = ablate.Ablation(deepcopy(config), tmp_path)
    assert first.run_folder(7) == tmp_path / 'runs' / 'YOLOv5_n_to_1__' / 'seed_7'
    config.ablation.contrasts = [('ema', 'raw')]  # other questions are no other runs
    ablate.Ablation(deepcopy(config), tmp_path)
    config.train_cfg.max_epochs = 31
    with pytest.raises(SystemExit):
        ablate.Ablation(config, tmp_path)


# --- the configs --------------------------------------------------------------------------------


def test_the_four_settings_are_there():
    settings = [Config.fromfile(CONFIG.parent / f'{name}.py').ablation for name in CONFIGS]
    assert [(about.family, about.schedule) for about in settings] == [
        ('RTMDet-tiny', 'to 1 %'),
        ('RTMDet-tiny', 'to a fifth'),
        ('YOLOv5-n', 'to 1 %'),
        ('YOLOv5-n', 'to a fifth'),
    ]


HORIZONS = {'0': 0.1, '4': 4, '20': 20, '40': 40, '60': 60}  # per cent held at the end


@pytest.mark.parametrize('name', CONFIGS)
def test_the_shares_are_those_of_the_names(name):
    config = Config.fromfile(CONFIG.parent / f'{name}.py')
    ema, switch = config.custom_hooks
    updates = (
        512
        // config.train_dataloader.batch_size
        * (config.train_cfg.max_epochs - switch.switch_epoch)
    )
    assert updates == 320
    for kind in ('none', 'hard', 'soft', 'schedule'):
        for number, share in HORIZONS.items():
            average = ema.also.get(f'{kind}_{number}')
            if average is None:
                assert kind in ('soft', 'schedule') and number not in ('4', '40')
                continue
            assert 100 * (1 - average.momentum) ** updates == pytest.approx(share, rel=0.02)
            before = switch.switch_epoch * 512 // 16
            assert math.exp(-before / average.gamma) < 1e-4 * average.momentum / 0.0016
            restart = average.get('restart', {})
            assert restart.get('steps', 0) == {'soft_4': 137, 'soft_40': 99}.get(
                f'{kind}_{number}', None if kind == 'schedule' else 0
            )
            if kind in ('hard', 'soft'):
                warm_up = restart.gamma * math.log(1 / average.momentum)
                assert warm_up == pytest.approx(updates / 2, rel=0.02)
            if kind == 'soft':
                kept = math.exp(-restart.gamma * math.exp(-restart.steps / restart.gamma))
                assert kept == pytest.approx(0.5, abs=0.005)
            if kind == 'schedule':
                assert restart.momentum == 2 * average.momentum
    assert (ema.momentum, ema.gamma) == (0.0002 if name.startswith('rtm') else 0.0001, 2000)
    ranges = config.ablation.ranges
    assert list(ranges) == ['range of hard', 'range of none']
    for kind in ('hard', 'none'):
        held = {f'{share:g}': f'{kind}_{number}' for number, share in HORIZONS.items()}
        assert ranges[f'range of {kind}'] == held


@pytest.mark.parametrize('name', CONFIGS)
def test_the_published_questions_are_those_of_the_configs(name):
    ablation = Config.fromfile(CONFIG.parent / f'{name}.py').ablation
    published = ablation_data.read_questions(ROOT / 'docs' / 'evidence')
    asked = ablation_data.questions_in(ablation)
    asked = json.loads(json.dumps({**vars(asked), 'rule': 'greater'}))
    assert vars(published[ablation.family, ablation.schedule]) == asked


@pytest.mark.parametrize('name', CONFIGS)
def test_where_the_learning_rate_ends(name):
    config = Config.fromfile(CONFIG.parent / f'{name}.py')
    hook = config.default_hooks.param_scheduler
    end = config.param_scheduler[1].eta_min_ratio if name.startswith('rtm') else hook.lr_factor
    assert end == (0.2 if name.endswith('fifth') else 0.01)


# --- evaluation ---------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """A model that finds the boxes of the annotations, more or less."""

    def __init__(self, truth):
        super().__init__()
        self.truth = truth

    def test_step(self, batch):
        from mmengine.structures import InstanceData

        generator = torch.Generator().manual_seed(0)
        for sample in batch['data_samples']:
            boxes, labels = [], []
            for annotation in self.truth.imgToAnns[sample.img_id]:
                x, y, width, height = annotation['bbox']
                boxes.append([x, y, x + width, y + height])
                labels.append(annotation['category_id'] - 1)
            boxes = torch.tensor(boxes) + 4 * torch.randn(len(boxes), 4, generator=generator)
            sample.pred_instances = InstanceData(
                bboxes=boxes,
                labels=torch.tensor(labels),
                scores=torch.rand(len(boxes), generator=generator),
            )
        return batch['data_samples']


def test_the_map_is_that_of_coco_metric(data):
    from mmdet.evaluation import CocoMetric

    config = Config.fromfile(CONFIG)
    config.test_dataloader.dataset.data_root = f'{data}/'
    annotations = config.test_evaluator.ann_file = str(data / 'annotations' / 'test.json')
    assert ablation_run.is_coco_map(config)
    split = ablation_run.CocoSplit(config.test_dataloader, config.test_evaluator)
    oracle = Oracle(split.truth)
    metric = CocoMetric(ann_file=annotations, metric='bbox')
    metric.dataset_meta = dict(classes=tuple('0123456789'))
    for batch in split.batches:
        metric.process(batch, [sample.to_dict() for sample in oracle.test_step(batch)])
    expected = metric.evaluate(6)['coco/bbox_mAP']
    assert 0.1 < expected < 0.9
    assert split.metrics(oracle)[METRIC] == pytest.approx(expected, abs=0.0005)
    nothing = SimpleNamespace(test_step=lambda batch: [])
    assert split.metrics(nothing) == {METRIC: 0}


TOY_HOOK = """custom_hooks = [
    dict(
        type='mmema.EMAHook',
        momentum=0.3,
        also=dict(long=dict(ema_type='mmema.RestartableDebiasedEMA', momentum=0.02)),
    ),
]
"""


def test_any_metric_of_any_config_is_compared(tmp_path):
    """A toy whose evaluator is of its own: `score`, minus the mean square error."""
    asked = dict(family='toy', contrasts=[('long', 'ema')])
    config = Config.fromfile(toy_file(tmp_path, asked))
    config.default_hooks.checkpoint.max_keep_ckpts = 2
    ablate.check_config(config)
    ablation = ablate.Ablation(config, tmp_path)
    for seed in (1, 2):
        ablation.run_folder(seed).mkdir()
        ablation_run.main([ablation.config, ablation.run_folder(seed), str(seed)])
    ablate.collect(tmp_path, config)
    rows = ablation_data.read_rows(tmp_path / 'runs.csv')
    assert len(rows) == 2 * 3 * 2 * 2  # seeds, averages, splits, epochs
    assert {row[5:7] for row in rows} == {(5, 'score'), (6, 'score')}
    values = {row[3:6]: row[7] for row in rows if row[2] == 1}
    assert len(set(values.values())) == len(values)
    (setting,) = ablation_data.read_settings(tmp_path)
    assert setting.questions.rule == 'greater'  # that of save_best
    reporting.report(tmp_path)
    assert 'long − ema' in (tmp_path / 'report.md').read_text()


# --- runs ---------------------------------------------------------------------------------------


@HOOKS.register_module()
class StopAblation(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            raise KeyboardInterrupt


@pytest.mark.extensive
def test_a_stopped_training_goes_on_with_the_same_random_numbers(data, tmp_path):
    config = Config.fromfile(CONFIG)
    config.merge_from_dict(
        {
            'train_dataloader.dataset.data_root': f'{data}/',
            'train_dataloader.batch_size': 4,
            'train_cfg.max_epochs': 3,
            'default_hooks.checkpoint.interval': 1,
        }
    )
    config.custom_hooks[1].switch_epoch = 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = ablation_run.train(named(config, 'whole'), tmp_path / 'whole', 5)
        stopped = named(config, 'stopped')
        stopped.custom_hooks.append(dict(type='StopAblation'))
        with pytest.raises(KeyboardInterrupt):
            ablation_run.train(stopped, tmp_path / 'stopped', 5)
        assert list((tmp_path / 'stopped').glob('epoch_*')) == [tmp_path / 'stopped/epoch_1.pth']
        resumed = ablation_run.train(named(config, 'resumed'), tmp_path / 'stopped', 5)
    finally:
        torch.set_num_threads(threads)
    assert resumed.iter == whole.iter == 6
    others = resumed.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, others[name]), name
    weights = [load(tmp_path / run / 'epoch_3.pth').sets() for run in ('whole', 'stopped')]
    assert list(weights[0])[:2] == ['ema', 'raw'] and 'hard_40' in weights[0]
    for name, state in weights[0].items():
        assert all(torch.equal(value, weights[1][name][key]) for key, value in state.items()), name
    raw, none = (weights[0][name]['backbone.stem.conv.weight'] for name in ('raw', 'none_40'))
    assert not torch.equal(raw, none)


def named(config, name):
    config = deepcopy(config)
    config.visualizer.name = f'ablation {name}'  # MMEngine makes only one of each name
    return config


def rows_of(folder):
    return ablation_data.read_rows(folder / 'runs.csv')


def toy_file(folder, ablation):
    """Write the toy's config, with averages to compare."""
    text = re.sub(r'custom_hooks = \[.*?^\]\n', TOY_HOOK, toy_config.TEXT, flags=re.S | re.M)
    return toy_config.write(folder, f'{text}ablation = {ablation}\n')


@pytest.fixture(params=['toy', pytest.param('digits', marks=pytest.mark.extensive)])
def short(request, tmp_path):
    """Arguments of a call of seconds, the number of its averages, and the first question."""
    if request.param == 'digits':
        data = request.getfixturevalue('data')
        # Raw, ema, 15 beside it, 2 recalibrated.
        return [CONFIG, *small_run(data)], 2 + 15 + 2, ['hard_40', 'none_40']
    asked = dict(family='toy', primary=['long', 'ema'], recalibrate=dict(long_bn='long'))
    file = toy_file(tmp_path, asked)
    file.write_text(
        file.read_text().replace("['runs']", "['runs', 'train_line']")
        + "custom_hooks.append(dict(type='Pace', slow=0.25))\n"  # time to interrupt it
    )
    options = ['train_cfg.max_epochs=3', 'default_hooks.checkpoint.max_keep_ckpts=2']
    return [file, '--cfg-options', *options], 4, ['long', 'ema']


@pytest.mark.slow
def test_an_interrupted_ablation_goes_on_and_leaves_out_what_fails(short, tmp_path):
    arguments, averages, primary = short
    out, errors = tmp_path / 'out', tmp_path / 'errors'
    asked = Config.fromfile(arguments[0]).ablation
    name = re.sub(r'\W', '_', f'{asked.family} {asked.get("schedule", "as configured")}')
    first, second, broken = (out / 'runs' / name / f'seed_{n}' for n in (7, 8, 9))
    broken.mkdir(parents=True)
    (broken / 'work').write_text('no folder')
    call = [*arguments, '--out', 'out', '--seeds', '3', '--first-seed', '7']
    process = forks.start(
        *(ROOT / 'tests' / 'command.py', 'ablate', *call, '--jobs', '1'),
        folder=tmp_path,
        out=tmp_path / 'printed',
        err=errors,
    )
    while not (first / 'work' / 'last_checkpoint').exists():
        assert process.poll() is None, errors.read_text()[-2000:]
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 130
    assert 'interrupted; the same call goes on where it was' in errors.read_text()
    assert not (first / 'result.csv').exists() and not second.exists()

    done = call_forked('ablate', *call, '--jobs', '2', folder=tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]
    assert 'resumed epoch: ' in (first / 'log.txt').read_text()
    assert f'failed, left out: {name}, seed 9: ' in done.stderr
    assert 'seed 9: ' in (out / 'report.md').read_text().split('## Left out')[1]
    rows = ablation_data.read_rows(out / 'runs.csv')
    assert len(rows) == averages * 2 * 2 * 2  # two splits; epochs 2 and 3; two seeds
    assert {(row[0], row[2]) for row in rows} == {(asked.family, seed) for seed in (7, 8)}
    assert not (first / 'work').exists()
    (asked,) = ablation_data.read_questions(out).values()
    assert asked.primary == primary
    ablation = ablate.Ablation(Config.fromfile(first.parent / 'config.py'), out)
    assert [ablation.is_done(seed) for seed in (7, 8, 9)] == [True, True, False]
