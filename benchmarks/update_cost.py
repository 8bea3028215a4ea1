"""Measure what one update of an averaged model costs, beside its limit and other libraries.

    python benchmarks/update_cost.py                # docs/performance.md, about 4 minutes
    python benchmarks/update_cost.py --quick        # the smallest model, some seconds
    python benchmarks/update_cost.py --device cuda  # on a GPU; `make gpu` runs the tests, too

The limit is one flat ``lerp_`` over all weights: two are read, one is written. Every round runs
all contenders in a new order, so that whatever else the machine does hits all alike; a figure is
the median of the rounds, a ratio the median of the ratios within a round. On the CPU each model is
measured twice: 'warm', right after another update of the same contender, and 'cold', after 96 MB
of other memory were visited; a training iteration lies between the two. On a GPU 'device' is the
time between two events in a stream that has enough to do for the program to run ahead (where one
waits for the GPU, its program's time is in it), and 'host' what the program itself spends. Before
anything is timed each contender's result is compared with the formula in float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
from functools import partial
from pathlib import Path

import torch
from clocks import (
    cold,
    measured,
    on_both,
    on_cpu,
    on_device,
    on_host,
    ratio,
    seconds_of,
    table,
    warm,
    with_spread,
)
from contenders import CONTENDERS, LIMIT, MOMENTUM, ON_GPU, OURS, checked, floats, limit
from model_shapes import CONFIGS, LARGE, build, has_mmyolo

import mmema
from mmema.averages.config import WARM_UP
from mmema.averages.units import blend_interval
from mmema.run.horizons import AUTO
from mmema.update.staging import staged_once

YOLO = tuple(CONFIGS)
SEVERAL = (1, 2, 4, 8, 16)  # averages in one run
LADDER = 'ladder'
LENGTHS = (1_000, 20_000, 100_000, 277_000)  # updates of a run with a ladder


def measure_models(names, rounds, device):
    """Return {(model, state of the caches): seconds by contender}."""
    evict = torch.zeros(24_000_000)
    found = {}
    for name in names:
        model = build(name, device)
        makes = CONTENDERS
        if name == LARGE:  # each is another 1.2 GB
            makes = {k: CONTENDERS[k] for k in (OURS, 'mmyolo', 'mmdet')}
        clocks = {'warm': warm, 'cold': cold(evict)}
        if device != 'cpu':
            makes = {**makes, **ON_GPU}
            clocks = {'device': on_device, 'host': on_host}
        works = {LIMIT: limit(model), **checked(model, makes)}
        count = max(5, rounds // {'YOLOv5-l': 4, LARGE: 10}.get(name, 1))
        for state, seconds in measured(works, count, clocks).items():
            found[name, state] = seconds
        weights = sum(tensor.numel() for tensor in floats(model))
        print(
            f'{name}: {weights / 1e6:.1f} M weights, {len(model.state_dict())} tensors', flush=True
        )
    return found


def measure_launches(names, device):
    """Return {model: {contender: (kernels and copies, waits) of one update}}."""
    from torch.autograd import DeviceType

    found = {}
    for name in names:
        model = build(name, device)
        found[name] = {}
        for contender, work in checked(model, {**CONTENDERS, **ON_GPU}).items():
            work()
            torch.cuda.synchronize()
            with torch.profiler.profile() as profile:
                work()
            events = profile.events()
            on_gpu = [e.name for e in events if e.device_type == DeviceType.CUDA]
            launches = sum('Sync' not in each for each in on_gpu)
            # A copy to pageable memory waits, too, without a call that says so.
            pageable = sum('Pageable' in each for each in on_gpu)
            waits = sum('Synchronize' in e.name for e in events if e.device_type == DeviceType.CPU)
            waits -= 1  # of the profiler's own end
            found[name][contender] = (launches, max(waits, 0) + pageable)
    return found


def measure_swap(name, rounds, device):
    """Return seconds to give a model its averaged weights and to take them away again."""
    from mmengine.hooks import EMAHook
    from mmengine.model import ExponentialMovingAverage

    model = build(name, device)
    ours, stock = mmema.ExpMomentumEMA(model, MOMENTUM), EMAHook()
    stock.src_model, stock.ema_model = model, ExponentialMovingAverage(model, MOMENTUM)

    def swapped():
        with mmema.averaged_weights(model, ours):
            pass

    def exchanged():
        stock._swap_ema_parameters()
        stock._swap_ema_parameters()

    works = {'mmema': swapped, 'mmengine': exchanged}
    return seconds_of(works, rounds, on_cpu if device == 'cpu' else on_both)


def measure_iteration(rounds, device):
    """Return seconds of a training iteration, alone and with averages.

    On a CPU of YOLOv5-n with 4 pictures of 128 pixels; on a GPU of YOLOv5-s with 16 of 640, with
    mixed precision.
    """
    name, pixels, batch = ('YOLOv5-n', 128, 4) if device == 'cpu' else ('YOLOv5-s', 640, 16)
    model = build(name, device)
    amp = device != 'cpu'
    scaler = getattr(torch.amp, 'GradScaler', torch.cuda.amp.GradScaler)(enabled=amp)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    pictures = torch.rand(batch, 3, pixels, pixels, device=device)
    boxes = torch.tensor([[i, 1, 16, 16, 80, 96] for i in range(batch)], device=device).float()
    meta = {'batch_input_shape': (pixels, pixels)}
    samples = {'bboxes_labels': boxes, 'img_metas': [meta] * batch}

    def step():
        with torch.autocast(device, torch.float16 if amp else torch.bfloat16, enabled=amp):
            losses = model.loss(pictures, samples)
        loss = sum(sum(v) if isinstance(v, (list, tuple)) else v.sum() for v in losses.values())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    def with_update(update):
        def work():
            step()
            update()

        return work

    makes = {name: CONTENDERS[name] for name in (OURS, 'mmyolo', 'mmdet')}
    works = {'no average': step}
    works.update({name: with_update(u) for name, u in checked(model, makes).items()})
    return seconds_of(works, rounds, on_cpu if device == 'cpu' else on_both)


def update_of_several(model, count):
    """Return an update of several averages of a model, as those in `also` of mmema.EMAHook."""
    averages = [mmema.ExpMomentumEMA(model, MOMENTUM * (k + 1), 1e-3) for k in range(count)]

    def update():
        with staged_once():
            for average in averages:
                average.update_parameters(model)

    return update


def measure_several(name, rounds, device):
    """Return {number of averages: seconds of an update of all}."""
    model = build(name, device)
    works = {count: update_of_several(model, count) for count in SEVERAL}
    for work in works.values():
        work()  # copies
    return seconds_of(works, rounds, on_cpu if device == 'cpu' else on_device)


def update_of_ladder(model, updates):
    """Return an update of the ladder of a run of so many updates, and after how many all blend."""
    rungs = [rung_of(model, share * updates) for share in AUTO]
    for rung in rungs:
        rung.update_parameters(model)  # copies

    def update():
        with staged_once():
            for rung in rungs:
                rung.update_parameters(model)

    return update, max(rung.interval for rung in rungs)


def rung_of(model, horizon):
    interval = blend_interval(horizon)
    rung = mmema.RestartableAnnealingEMA(
        model, interval / horizon, WARM_UP * interval, interval, update_buffers=True
    )
    rung.defers_copies = True
    return rung


def measure_ladder(name, rounds, device):
    """Return {updates of the run: mean seconds of an update, by contender}."""
    model, found = build(name, device), {}
    singles = {k: CONTENDERS[k] for k in (OURS, 'mmyolo')}
    for length in LENGTHS:
        update, many = update_of_ladder(model, length)
        many = max(many, 30)
        works = {**checked(model, singles), LADDER: update}
        works = {name: partial(repeat, work, many) for name, work in works.items()}
        seconds = seconds_of(works, rounds, on_cpu if device == 'cpu' else on_both)
        found[length] = {name: [each / many for each in own] for name, own in seconds.items()}
    return found


def repeat(work, times):
    for _ in range(times):
        work()


# --- tables and picture -------------------------------------------------------------------------


def models_table(found):
    heads = [f'{name}, {state}' for name, state in found]
    names = list(dict.fromkeys(name for seconds in found.values() for name in seconds))
    rows = [[name, *(cell_of(s, name, at) for (_, at), s in found.items())] for name in names]
    return table(['ms (x limit)', *heads], *rows)


def cell_of(seconds, name, state):
    if name not in seconds or (state == 'host' and name == LIMIT):
        return '-'
    text = with_spread(seconds[name])
    return text if state == 'host' else f'{text} ({ratio(seconds, name, LIMIT):.2f})'


def iteration_table(seconds, device):
    model = 'YOLOv5-n' if device == 'cpu' else 'YOLOv5-s with mixed precision'
    rows = [
        [name, with_spread(own), f'{100 * (ratio(seconds, name, "no average") - 1):+.1f} %']
        for name, own in seconds.items()
    ]
    return table([f'{model}, one training iteration', 'ms', 'more than none'], *rows)


def swap_table(name, seconds):
    rows = [[who, with_spread(own)] for who, own in seconds.items()]
    return table([f'averaged weights into {name} and out again', 'ms'], *rows)


def launches_table(found):
    heads = [f'{name}, {what}' for name in found for what in ('launches', 'waits')]
    contenders = dict.fromkeys(each for counts in found.values() for each in counts)
    rows = [
        [one, *(n for counts in found.values() for n in counts.get(one, ('-', '-')))]
        for one in contenders
    ]
    return table(['one update', *heads], *rows)


def several_table(name, found):
    rows = [
        [count, with_spread(own), f'{ratio(found, count, 1):.2f}'] for count, own in found.items()
    ]
    return table([f'averages of {name}', 'ms of an update of all', 'x one'], *rows)


def ladder_table(name, found):
    rows = [
        [
            f'{length:,}',
            *(with_spread(own) for own in seconds.values()),
            *(f'{ratio(seconds, LADDER, who):.2f}' for who in seconds if who != LADDER),
        ]
        for length, seconds in found.items()
    ]
    names = list(next(iter(found.values())))
    heads = [f'ms, {who}' for who in names] + [f'x {who}' for who in names if who != LADDER]
    return table([f'updates of a run of {name}', *heads], *rows)


def driver():
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
    return answer.split()[0]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--quick', action='store_true', help='YOLOv5-n alone, few rounds')
    parser.add_argument('--models', nargs='+', choices=[*YOLO, LARGE], default=[*YOLO, LARGE])
    parser.add_argument('--rounds', type=int, default=100, help='of the smallest model')
    parser.add_argument('--threads', type=int, help="torch's; default: torch's own choice")
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'], help='default: cpu')
    parser.add_argument(
        '--out',
        type=Path,
        help='folder for performance.md and .json (seconds of every round)',
    )
    args = parser.parse_args()
    if args.rounds < 3:
        parser.error(f'--rounds must be at least 3, got {args.rounds}')
    if args.device != 'cpu' and not torch.cuda.is_available():
        parser.error(f'--device {args.device} needs a CUDA device, and torch sees none')
    if args.quick:
        args.models, args.rounds = ['YOLOv5-n'], min(args.rounds, 20)
    if args.threads:
        torch.set_num_threads(args.threads)
    random.seed(0)
    torch.manual_seed(0)
    where = f'{platform.machine()}, {torch.get_num_threads()} threads'
    if args.device != 'cpu':
        where = f'{torch.cuda.get_device_name()}, driver {driver()}, CUDA {torch.version.cuda}'
    if not has_mmyolo():
        where += '; mmyolo is not installed: stand-ins with the tensors of its models'
    text = [f'{where}; Python {platform.python_version()}, torch {torch.__version__}']
    found = measure_models(args.models, args.rounds, args.device)
    text.append(models_table(found))
    figures, yolos = {}, [name for name in args.models if name in YOLO]
    if args.device == 'cpu':
        text.append('Launches and waits of a GPU: not measured.')
    else:
        figures['launches'] = measure_launches(yolos, args.device)
        text.append(launches_table(figures['launches']))
    figures['swap'] = measure_swap(args.models[0], args.rounds, args.device)
    text.append(swap_table(args.models[0], figures['swap']))
    if not args.quick:
        figures['several'] = measure_several('YOLOv5-s', args.rounds, args.device)
        text.append(several_table('YOLOv5-s', figures['several']))
        figures['ladder'] = measure_ladder('YOLOv5-s', 5, args.device)
        text.append(ladder_table('YOLOv5-s', figures['ladder']))
        if has_mmyolo():
            figures['iteration'] = measure_iteration(args.rounds, args.device)
            text.append(iteration_table(figures['iteration'], args.device))
        else:
            text.append('A training iteration: not measured, mmyolo is not installed.')
    print('\n\n'.join(['', *text]))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / 'performance.md').write_text('\n\n'.join(text) + '\n')
        updates = {}
        for (model, state), seconds in found.items():
            updates.setdefault(model, {})[state] = seconds
        figures = {'where': text[0], 'device': args.device, 'updates': updates, **figures}
        (args.out / 'performance.json').write_text(json.dumps(figures, indent=1))


if __name__ == '__main__':
    main()
