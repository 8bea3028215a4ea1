#!/usr/bin/env python3
"""Make a small detection set: handwritten digits on photographs, in COCO format.

Beside it the same for other tasks: ``masks/`` has for each picture which of its pixels are of a
digit (1, the others 0), ``crops/`` the boxes cut out, a folder for each digit.

Everything real comes inside scikit-learn: 1,797 handwritten digits (``load_digits``) and two
photographs (``load_sample_images``). The training set uses the first photograph and four fifths of
the digits of each class. Validation and test set each use a half of the other photograph and a half
of the other digits. Nothing is downloaded, and the same settings give the same bytes.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits, load_sample_images
from tqdm import tqdm

# Part of the settings: raise it when a scene of the same seed looks different.
GENERATOR = 2  # 1 had no test set; its training pictures are the same
SPLITS = ('train', 'val', 'test')
SETTINGS = ('generator', *SPLITS, 'seed', 'size')
CLASSES = tuple(str(digit) for digit in range(10))

HELD_OUT = 5  # one digit in five is kept from training: half for validation, half for the test
DIGITS_PER_SCENE = (2, 6)
DIGIT_SIDES = (0.19, 0.44)  # of the side of the picture
MAX_ROTATION = 20.0  # degrees; a 6 must not become a 9
BRIGHTNESS = (170, 256)  # of each colour channel of a digit
OPACITY = (0.75, 1.0)
PHOTO_SHARE = 0.45  # photographs are darkened to this, so that no digit is lost on them
MAX_HIDDEN = 0.25  # of the area of a digit, under or over others
INK = 0.5  # opacity from which a pixel belongs to the digit, and to its box
ATTEMPTS = 20  # to find a place for a digit

SIZES = (64, 320)


class UsageError(Exception):
    """What the person who called has to change, in one line."""


def check_settings(train, val, test, seed, size):
    """Return the settings of a set as a dict.

    Raises:
        UsageError: If a number is out of its range.
    """
    for name, value in (('--train', train), ('--val', val), ('--test', test)):
        if value < 1:
            raise UsageError(f'{name} must be at least 1 picture, got {value}')
    if seed < 0:
        raise UsageError(f'--seed must not be negative, got {seed}')
    if not SIZES[0] <= size <= SIZES[1]:
        raise UsageError(f'--size must be {SIZES[0]} to {SIZES[1]} pixels, got {size}')
    return dict(generator=GENERATOR, train=train, val=val, test=test, seed=seed, size=size)


def split_digits(labels, seed):
    """Return the indices of the digits of each split; every class is shared out alike."""
    rng = np.random.default_rng([seed, 2])
    shares = {split: [] for split in SPLITS}
    for digit in range(len(CLASSES)):
        shuffled = rng.permutation(np.flatnonzero(labels == digit))
        held_out = len(shuffled) // HELD_OUT
        shares['val'].append(shuffled[: held_out // 2])
        shares['test'].append(shuffled[held_out // 2 : held_out])
        shares['train'].append(shuffled[held_out:])
    return {split: np.concatenate(parts) for split, parts in shares.items()}


def photo_of(split):
    """Return the photograph, or the half of it, on which a split has its digits."""
    first, second = load_sample_images().images
    middle = second.shape[1] // 2
    return {'train': first, 'val': second[:, :middle], 'test': second[:, middle:]}[split]


def crop_photo(photo, size, rng):
    """Return a dark square of ``size`` pixels from anywhere in a photograph, flipped at random."""
    height, width = photo.shape[:2]
    side = int(rng.integers(size, min(height, width, 3 * size) + 1))
    top = int(rng.integers(height - side + 1))
    left = int(rng.integers(width - side + 1))
    crop = photo[top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    crop = cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=cv2.INTER_AREA)
    return crop.astype(np.float32) * PHOTO_SHARE


def render_digit(image, side, degrees):
    """Return the opacity, 0 to 1, of an 8x8 digit drawn ``side`` pixels high and rotated.

    The result is cut to the ink, so that its borders are the digit's box.
    """
    # Two empty pixels around the digit, for the corners that the rotation turns outwards.
    ink = np.pad(image.astype(np.float32) / image.max(), 2)
    canvas = int(np.ceil(side * ink.shape[0] / image.shape[0]))
    scale = canvas / ink.shape[0]
    turn = cv2.getRotationMatrix2D(((ink.shape[1] - 1) / 2, (ink.shape[0] - 1) / 2), degrees, scale)
    turn[:, 2] += (canvas - ink.shape[0]) / 2
    alpha = cv2.warpAffine(ink, turn, (canvas, canvas), flags=cv2.INTER_CUBIC)
    # Eight pixels blown up are a blur; a steeper edge makes them pen strokes again.
    alpha = np.clip((alpha - 0.25) / 0.35, 0, 1)
    rows, columns = np.nonzero(alpha >= INK)
    return alpha[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def draw_scene(photo, images, labels, size, rng):
    """Draw one scene.

    Args:
        photo: The photograph, RGB.
        images: The 8x8 digits to choose from, shape ``(n, 8, 8)``.
        labels: Their classes, shape ``(n,)``.
        size: Side of the scene in pixels.
        rng: The scene's own ``numpy.random.Generator``.

    Returns:
        The RGB picture (uint8), the list of its ``(label, (x, y, width, height))``, and the mask
        of each digit, hidden parts included.
    """
    scene = crop_photo(photo, size, rng)
    objects, masks = [], []
    for _ in range(int(rng.integers(DIGITS_PER_SCENE[0], DIGITS_PER_SCENE[1] + 1))):
        chosen = int(rng.integers(len(images)))
        side = size * rng.uniform(*DIGIT_SIDES)
        alpha = render_digit(images[chosen], side, rng.uniform(-MAX_ROTATION, MAX_ROTATION))
        colour = rng.integers(*BRIGHTNESS, size=3).astype(np.float32)
        opacity = np.float32(rng.uniform(*OPACITY))
        place = find_place(alpha >= INK, masks, size, rng)
        if place is None:
            continue
        x, y, mask = place
        height, width = alpha.shape
        part = scene[y : y + height, x : x + width]
        part += (colour - part) * (alpha * opacity)[..., None]
        objects.append((int(labels[chosen]), (x, y, width, height)))
        masks.append(mask)
    return np.rint(scene).astype(np.uint8), objects, masks


def find_place(ink, masks, size, rng):
    """Return ``(x, y, mask)`` of a place where ``ink`` shares little with other digits, or None."""
    height, width = ink.shape
    for _ in range(ATTEMPTS):
        x = int(rng.integers(size - width + 1))
        y = int(rng.integers(size - height + 1))
        mask = np.zeros((size, size), bool)
        mask[y : y + height, x : x + width] = ink
        drawn = [*masks, mask]
        shares = [hidden_share(drawn, k) for k in range(len(masks))]
        # On top of another digit one is as hard to see as under it.
        shares.append((mask & np.any(masks, axis=0)).sum() / mask.sum() if masks else 0)
        if max(shares) <= MAX_HIDDEN:
            return x, y, mask
    return None


def hidden_share(masks, k):
    """Return how much of digit ``k`` lies under the digits drawn after it, 0 to 1."""
    cover = np.any(masks[k + 1 :], axis=0)
    return (masks[k] & cover).sum() / masks[k].sum()


def make_split(split, folder, settings, progress):
    """Draw and write the pictures of one split; return its COCO annotations."""
    number = SPLITS.index(split)
    digits = load_digits()
    mine = split_digits(digits.target, settings['seed'])[split]
    images, labels = digits.images[mine], digits.target[mine]
    photo = photo_of(split)
    coco = dict(
        info=dict(description=f'mmema digits, {split}', **settings),
        images=[],
        annotations=[],
        categories=[dict(id=k + 1, name=name) for k, name in enumerate(CLASSES)],
    )
    (folder / split).mkdir()
    (folder / 'masks' / split).mkdir(parents=True)
    for name in CLASSES:
        (folder / 'crops' / split / name).mkdir(parents=True)
    size = settings['size']
    for index in range(settings[split]):
        # A generator for each scene: a larger set begins with the pictures of a smaller one.
        rng = np.random.default_rng([settings['seed'], number, index])
        picture, objects, masks = draw_scene(photo, images, labels, size, rng)
        name = f'{index:06d}.png'
        write_png(folder / split / name, picture)
        write_png(folder / 'masks' / split / name, np.any(masks, axis=0).astype(np.uint8))
        write_crops(folder / 'crops' / split, index, picture, objects)
        coco['images'].append(dict(id=index + 1, file_name=name, width=size, height=size))
        for label, box in objects:
            coco['annotations'].append(
                dict(
                    id=len(coco['annotations']) + 1,  # pycocotools takes 0 for 'no match'
                    image_id=index + 1,
                    category_id=label + 1,
                    bbox=list(box),
                    area=box[2] * box[3],
                    iscrowd=0,
                )
            )
        progress.update()
    return coco


def write_crops(folder, index, picture, objects):
    """Write the box of each digit of a scene, into the folder of its class."""
    for number, (label, (x, y, width, height)) in enumerate(objects):
        path = folder / CLASSES[label] / f'{index:06d}_{number}.png'
        write_png(path, picture[y : y + height, x : x + width])


def write_png(path, picture):
    """Write a picture, RGB or of one channel."""
    if not cv2.imwrite(str(path), picture[..., ::-1] if picture.ndim == 3 else picture):
        raise OSError(f'could not write {path}')


def found_settings(out):
    """Return the settings of the finished set at ``out``, None where there is nothing.

    Raises:
        UsageError: If something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        infos = [json.loads(annotation_file(out, split).read_text())['info'] for split in SPLITS]
        settings = [{name: info[name] for name in SETTINGS} for info in infos]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f'{out} is there and is not a digits set: move it away, or name another'
        ) from None
    for split, own in zip(SPLITS, settings):
        counts = [len(list((out / kind / split).glob('*.png'))) for kind in ('', 'masks')]
        if counts != [own[split]] * 2 or own != settings[0] or not (out / 'crops' / split).is_dir():
            raise UsageError(f'{out} is a damaged digits set: remove it and make it again')
    return settings[0]


def annotation_file(folder, split):
    """Return the path of the annotations of a split."""
    return folder / 'annotations' / f'{split}.json'


def make_digits(out, train=512, val=128, test=512, seed=0, size=128):
    """Make the set at ``out``, whole or not at all.

    Args:
        out: Folder to make; a finished set of the same settings is left as it is.
        train: Number of training pictures.
        val: Number of validation pictures.
        test: Number of test pictures.
        seed: What everything random is drawn from.
        size: Side of the pictures in pixels.

    Returns:
        True if anything was made, False if all was there.

    Raises:
        UsageError: If an argument is out of range, or ``out`` holds anything else.

    Example:
        >>> make_digits('data/digits', train=512, val=128, test=512, seed=0)
        True
    """
    out = Path(out).absolute()
    settings = check_settings(train, val, test, seed, size)
    found = found_settings(out)
    if found == settings:
        return False
    if found is not None:
        names = [name for name in settings if settings[name] != found[name]]
        differs = ', '.join(f'{name} {found[name]} instead of {settings[name]}' for name in names)
        raise UsageError(f'{out} is a digits set with {differs}: remove it, or name another folder')
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the result and not in /tmp: a rename is atomic on one file system only.
        partial = Path(tempfile.mkdtemp(prefix=f'.{out.name}-partial-', dir=out.parent))
    except OSError as error:
        raise UsageError(f'cannot make {out}: {error.strerror}') from None
    try:
        write_set(partial, settings)
        partial.chmod(out.parent.stat().st_mode & 0o777)
        os.rename(partial, out)
    except BaseException:  # Ctrl-C too: nothing half made stays behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return True


def write_set(folder, settings):
    """Write pictures and annotations into an empty folder."""
    (folder / 'annotations').mkdir()
    total = sum(settings[split] for split in SPLITS)
    with tqdm(total=total, desc='digits', unit='picture', disable=None) as progress:
        for split in SPLITS:
            coco = make_split(split, folder, settings, progress)
            annotation_file(folder, split).write_text(json.dumps(coco) + '\n')


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('out', type=Path, help='folder to make, for example data/digits')
    parser.add_argument('--train', type=int, default=512, help='training pictures (512)')
    parser.add_argument('--val', type=int, default=128, help='validation pictures (128)')
    parser.add_argument('--test', type=int, default=512, help='test pictures (512)')
    parser.add_argument('--seed', type=int, default=0, help='what all is drawn from (0)')
    parser.add_argument('--size', type=int, default=128, help='side of a picture in pixels (128)')
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        made = make_digits(args.out, args.train, args.val, args.test, args.seed, args.size)
    except (UsageError, OSError) as error:
        sys.exit(f'make_digits: {error}')
    except KeyboardInterrupt:
        sys.exit('make_digits: interrupted, nothing was kept')
    if made:
        counts = f'{args.train} training, {args.val} validation and {args.test} test pictures'
        print(f'{args.out}: {counts}')
    else:
        print(f'{args.out} is there already')


if __name__ == '__main__':
    main()
