"""What a run adds to the records of its averages: parts, iterations, causes; and `inspect`."""

import pytest
import torch
from marks import SINCE_TORCH_2_6
from runs import Crash, ema_of, loader, make_runner

from mmema.checkpoints.report import inspect
from mmema.record import Record
from mmema.run.record import epochs_until, iteration_of_epoch

pytestmark = SINCE_TORCH_2_6
OURS = dict(type='mmema.EMAHook', momentum=0.1, gamma=5, also=dict(short=dict(momentum=0.3)))
RESTART = dict(type='mmema.EMARestartHook', milestones=[2], steps=3, momentum=0.2)


def record_in(file, name='ema'):
    content = torch.load(file, weights_only=True)
    state = content['ema_state_dict']
    if name != 'ema':
        state = content['ema_also'][name]['state_dict']
    return Record.decode(state['record'])


def keys(part):
    names = ('iteration', 'epoch', 'epoch_length', 'batch', 'ranks', 'accumulation', 'begin')
    return tuple(part[name] for name in names)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Stopped after 7 of 24 iterations and resumed with a batch of 12, a restart before epoch 2."""
    folder = tmp_path_factory.mktemp('run')
    with pytest.raises(KeyboardInterrupt):
        make_runner(folder, RESTART, Crash(7), epochs=4, ema=OURS).train()
    make_runner(folder, RESTART, epochs=4, ema=OURS, resume=True, data=loader(12)).train()
    return folder


@pytest.mark.parametrize('name', ['ema', 'short'])
def test_parts_and_iterations(folder, name):
    record = record_in(folder / 'epoch_4.pth', name)
    parts = [(0, 0, 4, 6, 1, 1, 0), (4, 1, 2, 12, 1, 1, 0)]
    assert [keys(part) for part in record.parts] == parts
    assert all((folder / part['log']).is_dir() for part in record.parts)
    assert record.iterations == [[0, 1, 10]]
    assert [iteration_of_epoch(record.parts, epoch) for epoch in range(4)] == [0, 4, 6, 8]
    assert [epochs_until(record.parts, at) for at in (2, 4, 5, 10)] == [0.5, 1, 1.5, 4]


def test_a_restart_has_its_cause(folder):
    (event,) = record_in(folder / 'epoch_4.pth').events
    expected = dict(causes=['epoch 2'], iteration=6, steps=3, momentum=0.2, source='model')
    assert event == dict(update=6, what='restart', **expected)
    assert record_in(folder / 'epoch_4.pth', 'short').events == []


def test_inspect_prints_the_history(folder):
    lines = inspect(folder / 'epoch_4.pth').lines()
    history = [text for label, text in lines if label == 'history']
    assert [line.split(' (log')[0] for line in history] == [
        'update 0: started at iteration 0, epochs of 4 iterations, batch 6',
        'update 0: copied',
        'update 1: exp, momentum 0.1, gamma 5, from counter 1 on',
        'update 4: resumed at iteration 4, epochs of 2 iterations, batch 12',
        'update 6: restart, steps 3, momentum 0.2, causes epoch 2, iteration 6, source model',
        'update 6: exp, momentum 0.2, gamma 5, from counter 3 on',
    ]
    assert sum(label == 'history short' for label, _ in lines) == 4


def test_with_the_hook_of_mmengine_the_restart_hook_tells_it(tmp_path):
    runner = make_runner(tmp_path, RESTART, epochs=3)
    runner.train()
    record = ema_of(runner).record
    assert record.iterations == [[0, 1, 12]] and len(record.parts) == 1
    assert record.momenta()[8] == pytest.approx(0.8 * 2.718281828459045 ** (-4 / 5) + 0.2)


def test_weights_that_are_loaded_during_a_run_end_the_record(tmp_path):
    runner = make_runner(tmp_path, epochs=1, ema=dict(OURS, also=None))
    runner.train()
    torch.save(dict(state_dict=runner.model.state_dict()), tmp_path / 'weights.pth')
    runner.load_checkpoint(str(tmp_path / 'weights.pth'))
    record = ema_of(runner).record
    assert record.updates == 0 and record.events[-1]['what'] == 'weights loaded'
