"""Clocks of the benchmarks: works in a new order in every round, in the seconds of each."""

from __future__ import annotations

import gc
import random
import time
from statistics import median, quantiles

import torch

AHEAD = 20_000_000  # clock cycles for the program to run ahead: about 10 ms


def on_cpu(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def warm(work):
    work()
    return on_cpu(work)


def cold(memory):
    """Return a clock that visits other memory before."""

    def clock(work):
        memory.add_(1)
        return on_cpu(work)

    return clock


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


def measured(works, rounds, clocks):
    """Return {clock: {work: its seconds in every round}}; the order is new in each."""
    seconds = {clock: {name: [] for name in works} for clock in clocks}
    order = [(clock, name) for clock in clocks for name in works]
    gc.collect()
    for _ in range(rounds):
        random.shuffle(order)
        for clock, name in order:
            seconds[clock][name].append(clocks[clock](works[name]))
    return seconds


def seconds_of(works, rounds, clock):
    """Return {work: its seconds in every round} by one clock."""
    return measured(works, rounds, {'': clock})['']


def ratio(seconds, name, base):
    return median(a / b for a, b in zip(seconds[name], seconds[base]))


def with_spread(seconds):
    """Return the median in ms, and half the distance between the quartiles."""
    low, middle, high = quantiles(seconds, n=4, method='inclusive')
    return f'{middle * 1e3:.2f} ± {(high - low) / 2 * 1e3:.2f}'


def table(*rows):
    """Return rows of cells as Markdown; the first one is the head."""
    head, *others = rows
    lines = [head, ['---'] * len(head), *others]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
