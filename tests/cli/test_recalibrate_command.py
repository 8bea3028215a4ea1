"""mmema recalibrate: statistics by hand, on one rank and on two, and what it refuses."""

import forks
import pytest
import torch
import toy_config
from runs import Line, LineModel
from tool_runs import ROOT, call_here, refusal

TOOL = 'recalibrate'


@pytest.fixture
def toy(tmp_path):
    """A config and a bare state_dict, whose statistics are of no data."""
    model = LineModel()
    model.norm.running_mean.fill_(7.0)
    model.norm.num_batches_tracked.fill_(3)
    torch.save({'state_dict': model.state_dict(), 'meta': {'epoch': 1}}, tmp_path / 'toy.pth')
    return toy_config.write(tmp_path), tmp_path


def states(folder):
    return [
        torch.load(folder / name, weights_only=True)['state_dict']
        for name in ('toy.pth', 'out.pth')
    ]


@pytest.mark.parametrize('number', [2, 100])
def test_statistics_by_hand(toy, number, capsys):
    config, folder = toy
    call_here(TOOL, config, 'toy.pth', '-o', 'out.pth', '--batches', number, folder=folder)
    batches = min(number, 4)
    x = Line(16).x[: 4 * batches].view(batches, 4, 3)
    old, new = states(folder)
    torch.testing.assert_close(new['norm.running_mean'], x.mean((0, 1)))
    torch.testing.assert_close(new['norm.running_var'], x.var(1).mean(0))
    others = set(old) - {'norm.running_mean', 'norm.running_var'}
    assert all(torch.equal(old[name], new[name]) for name in others)
    printed = capsys.readouterr().out
    assert f'1 BatchNorm layers measured on {batches} batches, 1 rank, with ' in printed
    assert 'the pipeline after PipelineSwitchHook has switched: out.pth' in printed
    meta = torch.load(folder / 'out.pth', weights_only=True)['meta']
    assert meta['epoch'] == 1
    assert meta['mmema']['recalibrated'] == f'{batches} batches, 1 rank'


@pytest.mark.slow
def test_both_ranks_are_counted(toy):
    config, folder = toy
    call = [TOOL, config, 'toy.pth', '-o', 'out.pth', '--launcher', 'pytorch']
    ranks = forks.start_ranks(2, ROOT / 'tests' / 'command_rank.py', *call, folder=folder)
    assert [rank.wait() for rank in ranks] == [0, 0], (folder / 'rank_0.txt').read_text()[-3000:]
    # Rank 0 has samples 0, 2, 4 ... and rank 1 the others, in batches of four.
    x = torch.stack([Line(16).x[rank::2].view(2, 4, 3) for rank in (0, 1)])
    _, new = states(folder)
    torch.testing.assert_close(new['norm.running_mean'], x.mean((0, 1, 2)))
    torch.testing.assert_close(new['norm.running_var'], x.var(2).mean((0, 1)))
    assert 'on 2 batches, 2 ranks' in (folder / 'rank_0.txt').read_text()
    assert 'BatchNorm layers' not in (folder / 'rank_1.txt').read_text()


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        ('none.py toy.pth', 'no config file none.py'),
        ('toy.py none.pth', 'no checkpoint file none.pth; . holds'),
        ('toy.py toy.pth --batches 0', '--batches must be at least 1, got 0'),
        ('toy.py toy.pth --weights ema', 'toy.pth has no ema weights; it has raw'),
        ('toy.py cut.pth', 'cut.pth: it is damaged, cut short or no checkpoint at all'),
        ('toy.py other.pth', 'other.pth does not fit the model of the config: '),
        ('toy.py toy.pth -o toy.pth', 'toy.pth exists; --force replaces it'),
        ('toy.py toy.pth --mode los', 'no BatchNorm with running statistics got data in forward'),
    ],
)
def test_refuses(toy, arguments, reason, monkeypatch):
    _, folder = toy
    (folder / 'cut.pth').write_bytes((folder / 'toy.pth').read_bytes()[:500])
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / 'other.pth')
    if '--mode' in arguments:
        monkeypatch.setattr(LineModel, 'forward', lambda self, x, y=None, mode='tensor': x)
    words = arguments.split()
    if '-o' not in words:
        words += ['-o', 'out.pth']
    assert reason in refusal(TOOL, *words, folder=folder)
    assert not (folder / 'out.pth').exists()


def test_any_set_of_weights_of_a_run(tmp_path):
    runner, config = toy_config.train(tmp_path)
    file = tmp_path / 'w' / 'epoch_6.pth'
    call_here(TOOL, config, file, '-o', 'out.pth', '--weights', 'raw', folder=tmp_path)
    content = torch.load(tmp_path / 'out.pth', weights_only=True)
    raw = runner.model.state_dict()
    assert torch.equal(content['state_dict']['layers.0.weight'], raw['layers.0.weight'])
    assert content['meta']['mmema']['weights'] == 'raw'
