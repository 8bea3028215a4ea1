import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip('sklearn')
pytest.importorskip('tqdm')
from sklearn.datasets import load_digits, load_sample_images

TOOLS = Path(__file__).resolve().parent.parent / 'tools'

import make_digits as digits  # noqa: E402

TRAIN, VAL, TEST = 12, 5, 4


@pytest.fixture(scope='module')
def small_set(tmp_path_factory):
    out = tmp_path_factory.mktemp('digits') / 'set'
    assert digits.make_digits(out, train=TRAIN, val=VAL, test=TEST, seed=3)
    return out


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def annotations(folder, split):
    return json.loads((folder / 'annotations' / f'{split}.json').read_text())


def run_tool(*args, **kwargs):
    return subprocess.run(
        [sys.executable, str(TOOLS / 'make_digits.py'), *map(str, args)],
        capture_output=True,
        text=True,
        **kwargs,
    )


def drawn_scenes(monkeypatch, out, **settings):
    """Make a set and return what was drawn into each of its pictures, in their order."""
    scenes = []
    draw_scene = digits.draw_scene

    def keep(photo, images, labels, size, rng):
        scenes.append((photo, images, *draw_scene(photo, images, labels, size, rng)))
        return scenes[-1][2:]

    monkeypatch.setattr(digits, 'draw_scene', keep)
    digits.make_digits(out, **settings)
    return scenes


# The set ------------------------------------------------------------------------------------


def test_same_settings_give_the_same_bytes(small_set, tmp_path):
    digits.make_digits(tmp_path / 'again', train=TRAIN, val=VAL, test=TEST, seed=3)
    first, second = contents(small_set), contents(tmp_path / 'again')
    assert list(first) == list(second)
    assert first == second


def test_another_seed_gives_other_scenes(small_set, tmp_path):
    digits.make_digits(tmp_path / 'other', train=TRAIN, val=VAL, test=TEST, seed=4)
    first, second = contents(small_set), contents(tmp_path / 'other')
    names = [name for name in first if name.split('/')[0] in digits.SPLITS]
    assert names and not any(first[name] == second[name] for name in names)
    # The places of the digits are others too, not only the digits.
    numbers = [
        [annotation['image_id'] for annotation in annotations(folder, 'train')['annotations']]
        for folder in (small_set, tmp_path / 'other')
    ]
    assert numbers[0] != numbers[1]


def test_a_larger_set_begins_with_the_smaller_one(small_set, tmp_path):
    digits.make_digits(tmp_path / 'larger', train=TRAIN + 2, val=VAL, test=TEST, seed=3)
    small = {name: data for name, data in contents(small_set).items() if '0.png' in name}
    larger = contents(tmp_path / 'larger')
    assert small and all(larger[name] == data for name, data in small.items())


def test_layout_and_coco_fields(small_set):
    assert sorted(path.name for path in small_set.iterdir()) == [
        'annotations',
        'crops',
        'masks',
        'test',
        'train',
        'val',
    ]
    for split, count in (('train', TRAIN), ('val', VAL), ('test', TEST)):
        coco = annotations(small_set, split)
        assert [c['name'] for c in coco['categories']] == list('0123456789')
        assert [c['id'] for c in coco['categories']] == list(range(1, 11))
        files = sorted(path.name for path in (small_set / split).iterdir())
        assert [image['file_name'] for image in coco['images']] == files
        assert len(files) == count
        ids = [annotation['id'] for annotation in coco['annotations']]
        assert ids == list(range(1, len(ids) + 1))  # from 1: 0 is 'no match' to pycocotools
        pictures = {image['id'] for image in coco['images']}
        assert {annotation['image_id'] for annotation in coco['annotations']} == pictures
        for image in coco['images']:
            picture = cv2.imread(str(small_set / split / image['file_name']))
            assert picture.shape == (image['height'], image['width'], 3) == (128, 128, 3)


def test_pycocotools_reads_it(small_set, capsys):
    from pycocotools.coco import COCO

    coco = COCO(str(small_set / 'annotations' / 'val.json'))
    assert len(coco.getImgIds()) == VAL
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list('0123456789')


def test_splits_share_neither_digit_nor_photograph(monkeypatch, tmp_path):
    scenes = drawn_scenes(monkeypatch, tmp_path / 'set', train=4, val=4, test=4, seed=0)
    first, second = load_sample_images().images
    photos = (first, second[:, :320], second[:, 320:])  # 640 pixels wide
    pools = []
    for part, photo in zip((scenes[:4], scenes[4:8], scenes[8:]), photos):
        assert len(part) == 4 and all(np.array_equal(scene[0], photo) for scene in part)
        pools.append({image.tobytes() for scene in part for image in scene[1]})
    assert not np.array_equal(first[:400, :400], second[:400, :400])
    # scikit-learn's digits hold no picture twice, so equal pixels mean the same digit.
    assert len({image.tobytes() for image in load_digits().images}) == 1797
    assert len(set.union(*pools)) == sum(map(len, pools)) == 1797


def test_training_pictures_are_those_of_the_first_generator(tmp_path):
    # What was trained before there was a test set could be trained again.
    digits.make_digits(tmp_path / 'set', train=2, val=1, test=1)
    pixels = [cv2.imread(str(tmp_path / 'set' / 'train' / f'{k:06d}.png')) for k in range(2)]
    assert [zlib.crc32(picture.tobytes()) for picture in pixels] == [842588993, 2789284382]


def test_split_shares_out_every_class():
    labels = load_digits().target
    parts = digits.split_digits(labels, seed=0)
    for digit in range(10):
        count = (labels == digit).sum()
        held_out = count // 5
        assert (labels[parts['val']] == digit).sum() == held_out // 2
        assert (labels[parts['test']] == digit).sum() == held_out - held_out // 2
        assert (labels[parts['train']] == digit).sum() == count - held_out


def test_masks_and_crops_are_those_of_the_scenes(monkeypatch, tmp_path):
    scenes = drawn_scenes(monkeypatch, tmp_path / 'set', train=20, val=1, test=1, seed=0)
    crops = set()
    for index, (_, _, picture, objects, masks) in enumerate(scenes[:20]):
        file = tmp_path / 'set' / 'masks' / 'train' / f'{index:06d}.png'
        written = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        assert (written.dtype, written.shape) == (np.uint8, (128, 128))
        assert (written[np.any(masks, axis=0)] == 1).all()
        assert (written[~np.any(masks, axis=0)] == 0).all()
        for k, (label, (x, y, width, height)) in enumerate(objects):
            file = tmp_path / 'set' / 'crops' / 'train' / str(label) / f'{index:06d}_{k}.png'
            crops.add(file)
            part = picture[y : y + height, x : x + width]
            assert np.array_equal(cv2.imread(str(file))[..., ::-1], part)
    assert crops == set((tmp_path / 'set' / 'crops' / 'train').rglob('*.png'))
    classes = {path.name for path in (tmp_path / 'set' / 'crops' / 'val').iterdir()}
    assert classes == set('0123456789')  # also those of which one picture has none


def test_boxes_fit_the_ink_of_their_digit(monkeypatch, tmp_path):
    scenes = drawn_scenes(monkeypatch, tmp_path / 'set', train=30, val=1, test=1, seed=1)
    coco = annotations(tmp_path / 'set', 'train')
    found = 0
    for index, (_, _, _, objects, masks) in enumerate(scenes[:30]):
        written = [a for a in coco['annotations'] if a['image_id'] == index + 1]
        assert len(written) == len(objects) == len(masks) > 0
        for annotation, (label, _), mask in zip(written, objects, masks):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            x, y, width, height = annotation['bbox']
            assert (x, x + width - 1) == (columns[0], columns[-1])
            assert (y, y + height - 1) == (rows[0], rows[-1])
            assert annotation['area'] == width * height
            assert annotation['category_id'] == label + 1
            found += 1
    assert found > 60


def test_ink_is_where_the_mask_says(monkeypatch, tmp_path):
    # The first digit of a scene alone on it: outside its mask and a soft edge nothing changes.
    monkeypatch.setattr(digits, 'DIGITS_PER_SCENE', (1, 1))
    for _, _, picture, objects, (mask,) in drawn_scenes(
        monkeypatch, tmp_path / 'set', train=20, val=1, test=1, seed=2
    ):
        assert len(objects) == 1
        # The photograph is darkened to 0.45 * 255 = 115; a digit has at least 0.5 * 0.75 of 170.
        assert picture[mask].mean() > 115 > picture[~mask].mean()


def test_class_is_that_of_the_digit():
    data = load_digits()
    chosen = np.flatnonzero(data.target == 7)[:5]
    _, objects, _ = digits.draw_scene(
        load_sample_images().images[0],
        data.images[chosen],
        data.target[chosen],
        128,
        np.random.default_rng(0),
    )
    assert objects and {label for label, _ in objects} == {7}


def test_digits_hide_little_of_each_other(monkeypatch, tmp_path):
    overlapping = 0
    for _, _, _, _, masks in drawn_scenes(
        monkeypatch, tmp_path / 's', train=40, val=1, test=1, seed=0
    ):
        for k, mask in enumerate(masks):
            above = [other & mask for other in masks[k + 1 :]]
            below = [other & mask for other in masks[:k]]
            for others in (above, below):
                shared = np.any(others, axis=0).sum() if others else 0
                assert shared <= 0.25 * mask.sum()
                overlapping += shared > 0
    assert overlapping > 10  # some do


def test_sizes_rotations_and_colours_vary(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, 'DIGITS_PER_SCENE', (1, 1))
    scenes = drawn_scenes(monkeypatch, tmp_path / 'set', train=60, val=1, test=1, seed=0)
    heights = [objects[0][1][3] for *_, objects, _ in scenes]
    assert min(heights) < 32 and max(heights) > 48
    colours = [np.median(picture[mask], axis=0) for _, _, picture, _, (mask,) in scenes]
    assert np.ptp(colours, axis=0).min() > 50


def test_render_digit_turns_it():
    ink = np.zeros((8, 8))
    ink[1:7, 3:5] = 16  # six pixels high, two wide: at 64 pixels a side, 48 by 16
    upright = digits.render_digit(ink, 64, 0)
    assert upright.shape == pytest.approx((48, 16), abs=6)
    lying = digits.render_digit(ink, 64, 90)
    assert lying.shape == pytest.approx((16, 48), abs=6)
    leaning = digits.render_digit(ink, 64, 20)
    assert leaning.shape[1] > 1.5 * upright.shape[1]


# Calls --------------------------------------------------------------------------------------


def test_a_finished_set_is_left_as_it_is(small_set):
    before = {path: path.stat().st_mtime_ns for path in small_set.rglob('*')}
    assert digits.make_digits(small_set, train=TRAIN, val=VAL, test=TEST, seed=3) is False
    assert {path: path.stat().st_mtime_ns for path in small_set.rglob('*')} == before


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        (dict(train=0), '--train must be at least 1 picture, got 0'),
        (dict(val=-4), '--val must be at least 1 picture, got -4'),
        (dict(test=0), '--test must be at least 1 picture, got 0'),
        (dict(seed=-1), '--seed must not be negative, got -1'),
        (dict(size=63), '--size must be 64 to 320 pixels, got 63'),
        (dict(size=321), '--size must be 64 to 320 pixels, got 321'),
    ],
)
def test_bad_settings(tmp_path, settings, message):
    with pytest.raises(digits.UsageError, match=message):
        digits.make_digits(tmp_path / 'set', **settings)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('size', [64, 320])
def test_smallest_and_largest_size(tmp_path, size):
    digits.make_digits(tmp_path / 'set', train=3, val=1, test=1, size=size)
    for annotation in annotations(tmp_path / 'set', 'train')['annotations']:
        x, y, width, height = annotation['bbox']
        assert 0 <= x < x + width <= size and 0 <= y < y + height <= size


def test_other_settings_are_refused(small_set):
    with pytest.raises(digits.UsageError, match=f'train {TRAIN} instead of 7, seed 3 instead of 0'):
        digits.make_digits(small_set, train=7, val=VAL, test=TEST)
    assert len(list((small_set / 'train').iterdir())) == TRAIN


def test_foreign_content_is_refused_and_kept(tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(digits.UsageError, match='is not a digits set'):
        digits.make_digits(tmp_path, train=1, val=1, test=1)
    with pytest.raises(digits.UsageError, match='is not a digits set'):
        digits.make_digits(tmp_path / 'thesis.txt', train=1, val=1, test=1)
    assert (tmp_path / 'thesis.txt').read_text() == 'mine'


def test_a_damaged_set_is_named(tmp_path):
    digits.make_digits(tmp_path / 'set', train=2, val=1, test=1)
    for lost in ('train/000001.png', 'masks/val/000000.png'):
        content = (tmp_path / 'set' / lost).read_bytes()
        (tmp_path / 'set' / lost).unlink()
        with pytest.raises(digits.UsageError, match='damaged'):
            digits.make_digits(tmp_path / 'set', train=2, val=1, test=1)
        (tmp_path / 'set' / lost).write_bytes(content)
    (tmp_path / 'set' / 'crops' / 'val').rename(tmp_path / 'crops')
    with pytest.raises(digits.UsageError, match='damaged'):
        digits.make_digits(tmp_path / 'set', train=2, val=1, test=1)
    (tmp_path / 'set' / 'annotations' / 'val.json').write_text('{"info": ')
    with pytest.raises(digits.UsageError, match='is not a digits set'):
        digits.make_digits(tmp_path / 'set', train=2, val=1, test=1)


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / 'set').mkdir()
    assert digits.make_digits(tmp_path / 'set', train=1, val=1, test=1)


def test_an_error_on_the_way_leaves_nothing(monkeypatch, tmp_path):
    def full(*args):
        raise OSError('disk full')

    monkeypatch.setattr(digits, 'make_split', full)
    with pytest.raises(OSError, match='disk full'):
        digits.make_digits(tmp_path / 'set', train=1, val=1, test=1)
    assert not any(tmp_path.iterdir())


def test_command_line(tmp_path):
    result = run_tool('set', '--train', 2, '--val', 1, '--test', 3, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ('set: 2 training, 1 validation and 3 test pictures\n')
    result = run_tool('set', '--train', 2, '--val', 3, '--test', 3, cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ''
    assert result.stderr.startswith('make_digits: ') and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize('options', [['--train', '0'], ['--size', 'big'], ['--sed', '1']])
def test_bad_command_lines(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        digits.main(['set', *options])
    assert end.value.code not in (None, 0)
    assert not any(tmp_path.iterdir())


def test_second_call_says_that_all_is_there(small_set, capsys):
    counts = ['--train', str(TRAIN), '--val', str(VAL), '--test', str(TEST)]
    digits.main([str(small_set), *counts, '--seed', '3'])
    assert capsys.readouterr().out == f'{small_set} is there already\n'


@pytest.mark.skipif(os.name == 'nt', reason='sends a POSIX signal')
def test_an_interrupted_run_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(TOOLS / 'make_digits.py'), 'set', '--train', '100000'],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # A shell makes what it runs in the background deaf to it, and so all that this starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob('.set-partial-*/train/*.png')):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert 'make_digits: interrupted, nothing was kept' in errors
    assert 'Traceback' not in errors
    assert not any(tmp_path.iterdir())
