"""Real processes with gloo: every rank decides alike, and none waits for ever."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import torch
from runs import assert_same
from tool_runs import ROOT

TESTS = Path(__file__).parents[1]
PLATEAU = dict(metric='score', momentum_add=0.01)
# By epoch, as rank 0 sees it: plateaus after 2 and 4. The others see a metric that never improves.
SCRIPT = [None, 0.5, 0.4, 0.6, 0.55, 0.7, 0.8]


def launch(work_dir, ranks, **settings):
    """Run a job; return the exit status and the output of each rank."""
    file = work_dir / 'settings.json'
    file.write_text(json.dumps(dict(settings, work_dir=str(work_dir))))
    job = forks.start_ranks(ranks, TESTS / 'train_line.py', file, folder=work_dir)
    return ended(job, work_dir)


def ended(job, folder):
    status = [process.wait() for process in job]
    return status, [(folder / f'rank_{rank}.txt').read_text() for rank in range(len(job))]


def shared(state):
    """All but the statistics of BatchNorm, which are each rank's own by design."""
    return {k: v for k, v in state.items() if 'running_' not in k}


@pytest.mark.slow
@pytest.mark.parametrize('ranks', [2, 3])
@pytest.mark.parametrize('source', ['model', 'ema', 'best'])
def test_all_ranks_end_with_the_same_bits(tmp_path, ranks, source):
    hook = dict(
        type='mmema.EMARestartHook',
        milestones=[2],
        on_plateau=PLATEAU,
        source=source,
        steps=2,
        momentum=0.04,
    )
    status, output = launch(tmp_path, ranks, hooks=[hook], script=SCRIPT, only_rank_0_sees=True)
    assert status == [0] * ranks, '\n'.join(output)[-6000:]
    states = [torch.load(tmp_path / f'final_{rank}.pth') for rank in range(ranks)]
    assert states[0]['ema.restarts'] == 2  # the milestone falls on the first plateau
    for state in states[1:]:
        assert_same(shared(states[0]), shared(state))


@pytest.mark.slow
@pytest.mark.parametrize('rank', [0, 1])
def test_a_killed_rank_ends_the_job(tmp_path, rank):
    # Rank 1 is killed before the restart at which rank 0 waits for it, or the other way round.
    hook = dict(type='mmema.EMARestartHook', milestones=[2], source='best')
    status, output = launch(tmp_path, 2, hooks=[hook], die=[rank, 7])
    assert status[rank] == -signal.SIGKILL
    assert status[1 - rank] == 1 and 'Traceback' in output[1 - rank]
    assert not list(tmp_path.glob('final_*'))


@pytest.mark.slow
def test_an_error_on_rank_0_is_one_on_every_rank(tmp_path):
    hook = dict(type='mmema.EMARestartHook', on_plateau=dict(metric='wrong'))
    status, output = launch(tmp_path, 2, hooks=[hook])
    assert status == [1, 1]
    for text in output:
        assert "must be one of the run's metrics, got 'wrong'" in text


# --- tools/train.py ----------------------------------------------------------------------------

CONFIG = """
custom_imports = dict(imports=['runs', 'train_line'], allow_failed_imports=False)
default_scope = 'mmengine'
model = dict(type='LineModel')
model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
_data = dict(
    batch_size=6,
    num_workers=0,
    dataset=dict(type='Line'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
)
train_dataloader = val_dataloader = test_dataloader = _data
train_cfg = dict(by_epoch=True, max_epochs=2)
val_cfg = test_cfg = dict()
val_evaluator = test_evaluator = dict(type='Score')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.05))
custom_hooks = [
    dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA'),
    dict(type='Pace'),
]
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / 'line.py').write_text(CONFIG)
    return ['line.py', '--launcher', 'pytorch', '--work-dir', 'run']


def run_command(*words, folder):
    job = forks.start_ranks(2, TESTS / 'command_rank.py', *words, folder=folder)
    return ended(job, folder)


@pytest.mark.slow
def test_a_tool_ends_without_its_process_group(config, tmp_path):
    for words in (['train', *config], ['test', *config[:1], 'run/epoch_2.pth', *config[1:]]):
        status, output = run_command(*words, folder=tmp_path)
        assert status == [0, 0], '\n'.join(output)[-6000:]
        assert all(text.endswith('process group at exit: False\n') for text in output)
        (tmp_path / 'group').unlink(missing_ok=True)


@pytest.mark.extensive
@pytest.mark.parametrize('again', range(5))
def test_torchs_launcher_sees_success(config, tmp_path, again):
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
    done = subprocess.run(
        [sys.executable, *launcher, TESTS / 'command_rank.py', 'train', *config],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': forks.with_tests_on_path(), 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=forks.LIMIT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('process group at exit: False') == 2


@pytest.mark.extensive
def test_two_agents_of_torchrun_meet_as_two_machines_do(config, tmp_path):
    # As README has it: nothing but torchrun says that there are ranks.
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    meeting = ['--rdzv-backend', 'c10d', '--rdzv-endpoint', f'127.0.0.1:{port}', '--rdzv-id', 'a']
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', *meeting]
    tool = [ROOT / 'tools' / 'train.py', 'line.py', '--work-dir', 'run']
    environment = {**os.environ, 'PYTHONPATH': forks.with_tests_on_path(), 'OMP_NUM_THREADS': '1'}
    agents = [subprocess.Popen([*torchrun, *tool], cwd=tmp_path, env=environment) for _ in range(2)]
    try:
        assert [agent.wait(timeout=forks.LIMIT) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    log = ''.join(file.read_text() for file in (tmp_path / 'run').rglob('*.log'))
    assert 'Epoch(train) [2][2/2]' in log  # 24 samples in batches of 6 for each of two ranks
    assert (tmp_path / 'run/epoch_2.pth').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('how, status_of_1', [('die', -signal.SIGKILL), ('fail', 1)])
def test_a_tool_whose_other_rank_ended_ends_with_an_error(config, tmp_path, how, status_of_1):
    options = ['--cfg-options', f'custom_hooks.1.{how}=[1,2]']
    status, output = run_command('train', *config, *options, folder=tmp_path)
    assert status == [1, status_of_1]
    assert 'Traceback' in output[0]
    assert not any('terminate called' in text for text in output)


@pytest.mark.slow
def test_all_ranks_choose_the_same_rung_of_a_ladder(tmp_path):
    ema = dict(type='mmema.EMAHook', horizon=[f'{n} updates' for n in (2, 3, 5, 8)])
    hook = dict(type='mmema.EMAMonitorHook', check_ranks=1)
    status, output = launch(tmp_path, 2, ema=ema, hooks=[hook])
    assert status == [0] * 2, '\n'.join(output)[-6000:]
    states = [torch.load(tmp_path / f'final_{rank}.pth') for rank in range(2)]
    assert any(name.startswith('h8_updates.') for name in states[0])
    assert_same(shared(states[0]), shared(states[1]))
    assert 'chosen from now on' in output[0]
