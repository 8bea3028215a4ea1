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
import gc
import json
import multiprocessing
import platform
import random
import re
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles

import model_shapes
import torch
from torch import nn

import mmema
from mmema.update.staging import staged_once

MOMENTUM = 0.0002
YOLO = tuple(model_shapes.CONFIGS)
LARGE = '300 M'
LIMIT = 'limit: one flat lerp_'
COPY = '3 passes at the speed of a copy'
AHEAD = 20_000_000  # clock cycles for the program to run ahead: about 10 ms
SEVERAL = (1, 2, 4, 8, 16)  # averages in one run
OURS = ('mmema', 'mmema, update_buffers')


# --- contenders: each a function model -> (what returns the averaged module, update) ------------


def with_updates(average):
    return lambda: average.module, average.update_parameters


def mmema_class(model, **kwargs):
    return with_updates(mmema.ExpMomentumEMA(model, MOMENTUM, 1e-3, **kwargs))


def openmmlab(path):
    def make(model):
        module, name = path.rsplit('.', 1)
        cls = getattr(import_module(module), name)
        gamma = {} if name == 'ExponentialMovingAverage' else {'gamma': 1e-3}
        return with_updates(cls(model, momentum=MOMENTUM, update_buffers=True, **gamma))

    return make


def torch_averaged_model(model):
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    multi_avg_fn = get_ema_multi_avg_fn(1 - MOMENTUM)
    return with_updates(AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=True))


def timm_v3(model):
    from timm.utils import ModelEmaV3

    average = ModelEmaV3(model, decay=1 - MOMENTUM)
    return lambda: average.module, average.update


def ema_pytorch(model):
    from ema_pytorch import EMA

    average = EMA(model, beta=1 - MOMENTUM, update_after_step=0, update_every=1, power=1e9)
    return lambda: average.ema_model, lambda model: average.update()


def torch_ema(model):
    from torch_ema import ExponentialMovingAverage

    average = ExponentialMovingAverage(model.parameters(), 1 - MOMENTUM, use_num_updates=False)
    module = deepcopy(model)
    for parameter, shadow in zip(module.parameters(), average.shadow_params):
        parameter.data = shadow
    return lambda: module, lambda model: average.update()


def lists_made_once(model):
    """One operator for all parameters, and nothing that sees whether they are still the same."""
    average = deepcopy(model)
    averages, sources = ([p.detach() for p in m.parameters()] for m in (average, model))
    return lambda: average, lambda model: torch._foreach_lerp_(averages, sources, MOMENTUM)


def plain_loop(model):
    """YOLOv5, YOLOX, RT-DETR and D-FINE: state_dict, then two operators for each tensor."""
    average = deepcopy(model).eval()

    @torch.no_grad()
    def update(model):
        source = model.state_dict()
        for name, tensor in average.state_dict().items():
            if tensor.dtype.is_floating_point:
                tensor.mul_(1 - MOMENTUM).add_(source[name].detach(), alpha=MOMENTUM)

    return lambda: average, update


CONTENDERS = {
    OURS[0]: mmema_class,
    OURS[1]: lambda model: mmema_class(model, update_buffers=True),
    'mmyolo': openmmlab('mmyolo.models.ExpMomentumEMA'),
    'mmdet': openmmlab('mmdet.models.layers.ExpMomentumEMA'),
    'mmengine': openmmlab('mmengine.model.ExponentialMovingAverage'),
    'torch AveragedModel': torch_averaged_model,
    'timm ModelEmaV3': timm_v3,
    'ema-pytorch': ema_pytorch,
    'torch-ema': torch_ema,
    'YOLOv5 / D-FINE loop': plain_loop,
    'torch._foreach_lerp_ alone': lists_made_once,
}
STAGED, SYNCHRONOUS = "mmema, device='cpu'", 'synchronous copies to main memory'


def synchronous_copies(model):
    """An average in main memory that waits for every tensor."""
    average = deepcopy(model).cpu()

    @torch.no_grad()
    def update(model):
        for own, source in zip(average.parameters(), model.parameters()):
            own.lerp_(source.cpu(), MOMENTUM)
        for own, source in zip(average.buffers(), model.buffers()):
            own.copy_(source)

    return lambda: average, update


ON_GPU = {
    STAGED: lambda model: mmema_class(model, device='cpu'),
    SYNCHRONOUS: synchronous_copies,
}


def limits(model):
    size = sum(tensor.numel() for tensor in floats(model))
    device = next(model.parameters()).device
    average, source = torch.zeros(size, device=device), torch.ones(size, device=device)
    works = {LIMIT: lambda: average.lerp_(source, MOMENTUM)}
    if device.type != 'cpu':
        works[COPY] = lambda: average.copy_(source)  # two passes; the third is added to the figure
    return works


def floats(model):
    return [t for t in model.state_dict().values() if t.is_floating_point()]


class Update:
    """An update to be timed; ``settle`` finishes what the one before has left for later."""

    def __init__(self, update, model, module):
        self.update = update
        self.model = model
        self.settle = module

    def __call__(self):
        self.update(self.model)


def checked(model, makes):
    """Return each contender's update, once its second one is seen to follow the formula."""
    updates = {}
    for name, make in makes.items():
        try:
            module, update = make(model)
        except (ImportError, AssertionError):  # mmyolo asserts mmcv's version
            continue
        update(model)  # a first update copies, or finds both equal
        before = [p.detach().clone() for p in list(module().parameters())[:50]]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        update(model)
        for old, new, source in zip(before, module().parameters(), model.parameters()):
            old, new, source = (t.detach().cpu().double() for t in (old, new, source))
            exact = (1 - MOMENTUM) * old + MOMENTUM * source
            torch.testing.assert_close(
                new, exact, rtol=1e-6, atol=2e-7, msg=lambda m, n=name: f'{n} is off: {m}'
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(1)
        updates[name] = Update(update, model, module)
    return updates


# --- clocks -------------------------------------------------------------------------------------


def on_cpu(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def on_host(work):
    torch.cuda.synchronize()
    return on_cpu(work)


def on_device(work):
    for ahead in (AHEAD, 10 * AHEAD):
        getattr(work, 'settle', lambda: None)()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(ahead)
        start.record()
        work()
        end.record()
        was_ahead = not start.query()
        torch.cuda.synchronize()
        if was_ahead:
            break
    return start.elapsed_time(end) / 1e3


def on_both(work):
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(works, rounds, states):
    """Return {state: {work: its seconds in every round}}; the order is new in each."""
    seconds = {state: {name: [] for name in works} for state in states}
    order = [(state, name) for state in states for name in works]
    gc.collect()
    for _ in range(rounds):
        random.shuffle(order)
        for state, name in order:
            before, clock = states[state]
            before(works[name])
            taken = clock(works[name])
            passes = 3 / 2 if name == COPY and clock is on_device else 1
            seconds[state][name].append(passes * taken)
    return seconds


def nothing(work):
    pass


def ratio(seconds, name, base):
    return median(a / b for a, b in zip(seconds[name], seconds[base]))


def build(name, device):
    if name == LARGE:
        # 24 blocks of a transformer 1024 wide: 12 tensors each.
        layer = nn.TransformerEncoderLayer(1024, 16, 4096, batch_first=True)
        return nn.Sequential(*(deepcopy(layer) for _ in range(24))).to(device)
    if has_mmyolo():
        return model_shapes.real_model(name).train().to(device)
    return model_shapes.stand_in(name).train().to(device)


def has_mmyolo():
    try:
        import mmyolo.models  # noqa: F401
    except (ImportError, AssertionError):  # it asserts mmcv's version
        return False
    return True


def measure_models(names, rounds, device):
    """Return {(model, state of the caches): seconds by contender}."""
    evict = torch.zeros(24_000_000)
    found = {}
    for name in names:
        model = build(name, device)
        makes = CONTENDERS
        if name == LARGE:  # each is another 1.2 GB
            makes = {k: CONTENDERS[k] for k in (OURS[0], 'mmyolo', 'mmdet')}
        states = {
            'warm': (lambda work: work(), on_cpu),
            'cold': (lambda work: evict.add_(1), on_cpu),
        }
        if device != 'cpu':
            makes = {**makes, **ON_GPU}
            states = {'device': (nothing, on_device), 'host': (nothing, on_host)}
        works = {**limits(model), **checked(model, makes)}
        count = max(5, rounds // {'YOLOv5-l': 4, LARGE: 10}.get(name, 1))
        for state, seconds in measured(works, count, states).items():
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
    clock = on_cpu if device == 'cpu' else on_both
    return measured(works, rounds, {'': (nothing, clock)})['']


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

    makes = {name: CONTENDERS[name] for name in (OURS[0], 'mmyolo', 'mmdet')}
    works = {'no average': step}
    works.update({name: with_update(u) for name, u in checked(model, makes).items()})
    clock = on_cpu if device == 'cpu' else on_both
    return measured(works, rounds, {'': (nothing, clock)})['']


def measure_growth(rounds, device):
    """Return {(tensors, weights): seconds} where one of the two grows."""
    sizes = [(n, 4_000_000) for n in (10, 100, 1000, 3000)]
    sizes += [(300, n) for n in (300_000, 3_000_000, 30_000_000)]
    found = {}
    for tensors, weights in sizes:
        side = max(2, weights // tensors // 8)
        model = nn.ParameterList([nn.Parameter(torch.rand(side, 8)) for _ in range(tensors)])
        model = model.to(device)
        works = limits(model)
        works.update(checked(model, {k: CONTENDERS[k] for k in (OURS[0], 'mmyolo', 'mmdet')}))
        clock = on_cpu if device == 'cpu' else on_device
        found[tensors, weights] = measured(works, rounds, {'': (nothing, clock)})['']
    return found


def measure_parts(names, rounds):
    """Return {model: seconds} of the parts of an update of mmema, and of a whole one."""
    found = {}
    for name in names:
        model = build(name, 'cpu')
        average = mmema.ExpMomentumEMA(model, MOMENTUM, 1e-3)
        for _ in range(3):
            average.update_parameters(model)
        follower = average._follower
        parts = {
            'staleness check': partial(follower.holds, average.module, model),
            'blend': lambda f=follower: f._blended.lerp(MOMENTUM),
            'copy': follower._copied.copy,
            'a whole update': lambda a=average, m=model: a.update_parameters(m),
        }
        found[name] = seconds = {part: [] for part in parts}
        with torch.no_grad():
            for _ in range(rounds):
                for part, work in parts.items():
                    seconds[part].append(on_cpu(work))
    return found


def update_of_several(model, count):
    """Return an update of several averages of a model, as those in `also` of mmema.EMAHook."""
    averages = [mmema.ExpMomentumEMA(model, MOMENTUM * (k + 1), 1e-3) for k in range(count)]

    def update():
        with staged_once():
            for average in averages:
                average.update_parameters(model)

    return update


def measure_several(name, rounds, device):
    """Return {number of averages: (seconds of an update of all, bytes that they take)}."""
    model = build(name, device)
    works = {count: update_of_several(model, count) for count in SEVERAL}
    for work in works.values():
        work()  # copies
    states = {'': (nothing, on_cpu if device == 'cpu' else on_device)}
    seconds = measured(works, rounds, states)['']
    # In new processes: memory that was freed in this one would be used again.
    spawn = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        taken = pool.map(partial(memory_of_several, name, device=device), SEVERAL)
        return {count: (seconds[count], size) for count, size in zip(SEVERAL, taken)}


def memory_of_several(name, count, device):
    """Return the bytes that a process needs for several averages and their updates."""
    model = build(name, device)
    before = memory_used(device)
    update = update_of_several(model, count)
    for _ in range(3):
        update()
    gc.collect()
    return memory_used(device) - before


def memory_used(device):
    """Return the bytes in use: of a GPU by torch, else all that this process has."""
    if device != 'cpu':
        return torch.cuda.memory_allocated()
    return 1024 * int(re.search(r'VmRSS:\s+(\d+)', Path('/proc/self/status').read_text())[1])


# --- tables and picture -------------------------------------------------------------------------


def models_table(found):
    heads = [f'{name}, {state}' for name, state in found]
    names = list(dict.fromkeys(name for seconds in found.values() for name in seconds))
    lines = [f'| ms (x limit) | {" | ".join(heads)} |', '| --- |' + ' --- |' * len(heads)]
    for name in names:
        cells = [cell_of(s, name, state) for (_, state), s in found.items()]
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def cell_of(seconds, name, state):
    if name not in seconds or (state == 'host' and name in (LIMIT, COPY)):
        return '-'
    text = with_spread(seconds[name])
    return text if state == 'host' else f'{text} ({ratio(seconds, name, LIMIT):.2f})'


def with_spread(seconds):
    """Return the median in ms, and half the distance between the quartiles."""
    low, middle, high = quantiles(seconds, n=4, method='inclusive')
    return f'{middle * 1e3:.2f} ± {(high - low) / 2 * 1e3:.2f}'


def iteration_table(seconds, device):
    model = 'YOLOv5-n' if device == 'cpu' else 'YOLOv5-s with mixed precision'
    lines = [f'| {model}, one training iteration | ms | more than none |', '| --- | --- | --- |']
    for name, values in seconds.items():
        more = 100 * (ratio(seconds, name, 'no average') - 1)
        lines.append(f'| {name} | {with_spread(values)} | {more:+.1f} % |')
    return '\n'.join(lines)


def swap_table(name, seconds):
    lines = [f'| averaged weights into {name} and out again | ms |', '| --- | --- |']
    lines += [f'| {who} | {with_spread(values)} |' for who, values in seconds.items()]
    return '\n'.join(lines)


def launches_table(found):
    heads = [f'{name}, {what}' for name in found for what in ('launches', 'waits')]
    lines = [f'| one update | {" | ".join(heads)} |', '| --- |' + ' --- |' * len(heads)]
    for contender in dict.fromkeys(each for counts in found.values() for each in counts):
        cells = [n for counts in found.values() for n in counts.get(contender, ('-', '-'))]
        lines.append(f'| {contender} | {" | ".join(map(str, cells))} |')
    return '\n'.join(lines)


def parts_table(found):
    lines = [f'| ms of an update | {" | ".join(found)} |', '| --- |' + ' --- |' * len(found)]
    for part in next(iter(found.values())):
        cells = [f'{median(seconds[part]) * 1e3:.2f}' for seconds in found.values()]
        lines.append(f'| {part} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def several_table(name, found):
    one, _ = found[SEVERAL[0]]
    lines = [f'| averages of {name} | ms of an update of all | x one | MB |', '| --- ' * 4 + '|']
    for count, (seconds, size) in found.items():
        times = median(a / b for a, b in zip(seconds, one))
        lines.append(f'| {count} | {median(seconds) * 1e3:.2f} | {times:.2f} | {size / 1e6:.1f} |')
    return '\n'.join(lines)


def growth_table(found):
    names = list(next(iter(found.values())))
    lines = [
        f'| tensors | weights | {" | ".join(names)} |',
        '| --- |' + ' --- |' * (len(names) + 1),
    ]
    for (tensors, weights), s in found.items():
        cells = [f'{median(s[name]) * 1e3:.2f}' for name in names]
        lines.append(f'| {tensors} | {weights / 1e6:g} M | {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw(found, growth, path):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout='constrained')
    right.set_visible(bool(growth))
    warm = {name: s for (name, state), s in found.items() if state in ('warm', 'device')}
    names = [
        n for n in dict.fromkeys(n for s in warm.values() for n in s) if n not in (LIMIT, COPY)
    ]
    colours = {name: plt.cm.tab20(i) for i, name in enumerate(names)}
    colours[LIMIT] = 'black'
    for i, name in enumerate(names):
        at = [(k, ratio(s, name, LIMIT)) for k, s in enumerate(warm.values()) if name in s]
        width = 0.8 / len(names)
        places = [k - 0.4 + (i + 0.5) * width for k, _ in at]
        left.bar(places, [r for _, r in at], width, label=name, color=colours[name])
    left.axhline(1, color='black', linewidth=1)
    left.set_xticks(range(len(warm)), list(warm))
    left.set_yscale('log')
    left.set_yticks([1, 2, 3, 5, 10, 20, 30], [1, 2, 3, 5, 10, 20, 30])
    left.minorticks_off()
    left.set_ylabel('time of an update / limit')
    left.set_title('Cost of one update (1 = one flat lerp_)')
    left.legend(fontsize=8)
    tensors = [key for key in growth if key[1] == 4_000_000]
    for name in next(iter(growth.values()), {}):
        values = [median(growth[key][name]) * 1e3 for key in tensors]
        right.plot(
            [key[0] for key in tensors], values, marker='o', label=name, color=colours.get(name)
        )
    right.set(xscale='log', yscale='log', xlabel='tensors', ylabel='ms')
    right.set_yticks([1, 2, 5, 10, 20, 50], [1, 2, 5, 10, 20, 50])
    right.minorticks_off()
    right.set_title('4 M weights in more and more tensors')
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)


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
        help='folder for performance.md, .json (seconds of every round) and .png',
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
    figures, growth, yolos = {}, {}, [name for name in args.models if name in YOLO]
    if args.device == 'cpu':
        text.append('Launches and waits of a GPU: not measured.')
    else:
        figures['launches'] = measure_launches(yolos, args.device)
        text.append(launches_table(figures['launches']))
    figures['swap'] = measure_swap(args.models[0], args.rounds, args.device)
    text.append(swap_table(args.models[0], figures['swap']))
    if not args.quick:
        if args.device == 'cpu':
            text.append(parts_table(measure_parts(yolos, args.rounds)))
        figures['several'] = measure_several('YOLOv5-s', args.rounds, args.device)
        text.append(several_table('YOLOv5-s', figures['several']))
        if has_mmyolo():
            figures['iteration'] = measure_iteration(args.rounds, args.device)
            text.append(iteration_table(figures['iteration'], args.device))
        else:
            text.append('A training iteration: not measured, mmyolo is not installed.')
        growth = measure_growth(max(3, args.rounds // 4), args.device)
        text.append(growth_table(growth))
    print('\n\n'.join(['', *text]))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / 'performance.md').write_text('\n\n'.join(text) + '\n')
        updates = {}
        for (model, state), seconds in found.items():
            updates.setdefault(model, {})[state] = seconds
        figures = {'where': text[0], 'device': args.device, 'updates': updates, **figures}
        (args.out / 'performance.json').write_text(json.dumps(figures, indent=1))
        draw(found, growth, args.out / 'performance.png')


if __name__ == '__main__':
    main()
