"""Averages of sharded models, in real processes; the checks are in ``shard_cases.py``."""

from pathlib import Path

import forks
import pytest
import torch

SCRIPT = Path(__file__).with_name('shard_cases.py')
HAS_FSDP2 = hasattr(torch.distributed.fsdp, 'fully_shard')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_FSDP2, reason='torch 2.7 has FSDP2')]

CASES = [
    line[4 : line.index('(')]
    for line in SCRIPT.read_text().splitlines()
    if line.startswith('def ') and line.endswith('():') and line != 'def main():'
]


@pytest.fixture(scope='module')
def outputs(tmp_path_factory):
    """Return status and output of the ranks of a job of two and of one of four."""
    outputs = {}
    for world in (2, 4):
        folder = tmp_path_factory.mktemp(f'ranks_{world}')
        ranks = forks.start_ranks(world, SCRIPT, *CASES, folder=folder)
        status = [rank.wait() for rank in ranks]
        texts = [(folder / f'rank_{i}.txt').read_text() for i in range(world)]
        outputs[world] = status, texts
    return outputs


@pytest.mark.parametrize('world', [2, 4])
@pytest.mark.parametrize('case', CASES)
def test_on_ranks(outputs, world, case):
    # With 4 ranks some have no part of a layer of 3 rows.
    status, texts = outputs[world]
    failed = [text.split('failed: ')[-1].split() for text in texts if 'failed: ' in text]
    assert not any(case in names for names in failed), '\n'.join(texts)[-6000:]
    assert failed or status == [0] * world, '\n'.join(texts)[-6000:]
