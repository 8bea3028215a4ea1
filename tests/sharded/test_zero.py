"""DeepSpeedStrategy: a run by ZeRO-1 or 2 has the bits of DDP, and resumes with its averages.

Two real ranks (gloo) of deepspeed. `make setup` does not install it; `make stacks` does.
"""

from pathlib import Path

import forks
import pytest
import torch
from runs import assert_same
from test_strategy import flat

import mmema
from mmema.checkpoints import report
from mmema.checkpoints.export import export
from mmema.checkpoints.files import content_of
from mmema.messages import RunError
from mmema.run import facts_in_config

SCRIPT = Path(__file__).parents[1] / 'zero_line.py'
NAMES = ['zero_1', 'zero_2', 'bf16_1', 'bf16_2']
REFUSED = {
    'stage_0': "must be 1 or 2, got 0. Train with strategy=dict(type='DDPStrategy')",
    'stage_3': "must be 1 or 2, got 3. Train with strategy=dict(type='mmema.FullyShardStrategy')",
    'stock_strategy': "Train with strategy=dict(type='mmema.DeepSpeedStrategy')",
    'stock_hook': "DeepSpeedStrategy needs mmema.EMAHook, got MMEngine's EMAHook. Set type=",
    'from_best': "with DeepSpeedStrategy source must be 'model', got 'best'",
    'recalibrate': 'DeepSpeedOptimWrapper has none. Leave the hook out',
    'from_file': 'resumes from a folder that it has saved, got',
}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """Return a folder in which two ranks have run all cases of zero_line.py."""
    pytest.importorskip('deepspeed')
    root = tmp_path_factory.mktemp('zero')
    cases = [*NAMES, *(f'rest_{name}' for name in NAMES), 'ddp', 'seldom', 'inside', 'from_inside']
    cases += ['loaded', 'accumulated', 'tested', 'tested_by_ddp', *REFUSED]
    ranks = forks.start_ranks(2, SCRIPT, root, *cases, folder=root, DS_ACCELERATOR='cpu')
    status = [rank.wait() for rank in ranks]
    assert status == [0, 0], (root / 'rank_0.txt').read_text()[-3000:]
    for case in set(cases) - set(REFUSED):
        error = root / f'{case}.txt'
        assert not error.exists(), error.read_text()
    return root


def averages(folder):
    """Return the averaged and raw weights, counters and further averages of a checkpoint."""
    content = content_of(folder)
    keys = ('state_dict', 'ema_state_dict', 'ema_also')
    values = flat({key: content[key] for key in keys})
    # Means of a metric over two ranks' samples differ in their last bits.
    return {key: value for key, value in values.items() if 'plateau.best' not in key}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['zero_1', 'zero_2'])
def test_zero_has_the_bits_of_ddp(root, name):
    for epoch in range(1, 5):
        ours, plain = (root / case / f'epoch_{epoch}.pth' for case in (name, 'ddp'))
        assert_same(averages(plain), averages(ours))


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_a_resumed_run_has_the_bits_of_a_whole_one(root, name):
    whole, rest = (averages(root / case / 'epoch_4.pth') for case in (name, f'rest_{name}'))
    assert_same(whole, rest)
    assert whole['.ema_state_dict.steps'] == 8
    half = averages(root / name / 'epoch_2.pth')
    assert not torch.equal(half['.state_dict.norm.weight'], whole['.state_dict.norm.weight'])


@pytest.mark.slow
@pytest.mark.parametrize('name', ['bf16_1', 'bf16_2'])
def test_bf16_weights_have_a_float32_average(root, name):
    content = content_of(root / name / 'epoch_4.pth')
    assert content['state_dict']['norm.weight'].dtype == torch.float32
    assert content['ema_state_dict']['module.norm.weight'].dtype == torch.bfloat16


@pytest.mark.slow
def test_a_validation_changes_no_bit_of_the_training(root):
    seldom, often = (averages(root / case / 'epoch_4.pth') for case in ('seldom', 'zero_1'))
    assert_same(*({k: v for k, v in one.items() if 'also' not in k} for one in (seldom, often)))


@pytest.mark.slow
def test_what_is_saved_during_a_validation_can_be_resumed(root):
    ours, whole = (averages(root / case / 'epoch_4.pth') for case in ('from_inside', 'zero_1'))
    assert_same(*({k: v for k, v in one.items() if 'plateau' not in k} for one in (ours, whole)))


@pytest.mark.slow
def test_training_goes_on_from_weights_that_were_loaded(root):
    # DeepSpeed trains a copy: without a refresh the first step would undo the loading.
    bare = torch.load(root / 'bare.pth')
    content = content_of(root / 'loaded/epoch_1.pth')
    for name in ('layers.0.weight', 'two.0.weight', 'frozen'):
        assert torch.equal(content['ema_state_dict'][f'module.{name}'], bare[name])
        assert torch.allclose(content['state_dict'][name], bare[name])


@pytest.mark.slow
def test_an_update_follows_the_step_of_deepspeed(root):
    steps, facts = torch.load(root / 'accumulated.pth', weights_only=False)
    assert (steps, facts.updates, facts.accumulation) == (3, 3, 2)
    # As the file tells it later.
    config = dict(custom_hooks=[dict(type='mmema.EMAHook')])
    content = content_of(root / 'accumulated/iter_7.pth')
    facts = facts_in_config(config, 4, iterations=7, deepspeed=content['ds_config'])
    assert (facts.accumulation, facts.updates) == (2, 3)


@pytest.mark.slow
def test_the_averaged_weights_are_tested(root):
    ours, plain = (
        torch.load(root / f'{case}.pth', weights_only=False) for case in ('tested', 'tested_by_ddp')
    )
    assert ours == plain and ours['score'] < 0


@pytest.mark.slow
def test_a_folder_can_be_inspected_and_exported(root, tmp_path):
    folder = root / 'zero_1/epoch_4.pth'
    assert dict(report.inspect(folder).lines())['updates'] == '8'
    out = export(folder, tmp_path / 'ema.pth', 'ema', named_by_hash=False)
    assert_same(torch.load(out)['state_dict'], content_of(root / 'ddp/epoch_4.pth')['state_dict'])


@pytest.mark.slow
@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_work_is_refused_with_the_way_out(root, case):
    text = (root / f'{case}.txt').read_text()
    assert REFUSED[case] in text and '\n' not in text


def test_without_deepspeed_it_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr('mmema.sharded.zero.find_spec', lambda name: None)
    with pytest.raises(RunError, match='needs deepspeed, which is not installed: pip install'):
        mmema.DeepSpeedStrategy(work_dir=str(tmp_path))
