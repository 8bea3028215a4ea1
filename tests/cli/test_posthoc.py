"""mmema posthoc as people call it: what it prints, writes and refuses."""

import re
import shutil

import pytest
import torch
import toy_config
from tool_runs import call_here, output_of, refusal

TOOL = 'posthoc'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    runner, config = toy_config.train(tmp_path_factory.mktemp('run'))
    return config.parent / 'w', config


def record_in(file):
    return torch.load(file, weights_only=True)['meta']['mmema']


def test_each_command_from_any_folder(run, tmp_path):
    folder, _ = run
    epochs = [folder / f'epoch_{epoch}.pth' for epoch in range(1, 7)]
    printed = output_of(TOOL, 'restart', epochs[1], epochs[5], '-o', 'a.pth', folder=tmp_path)
    assert printed.splitlines() == [
        'average   ema, as if restarted hard after epoch 2, at epoch 6',
        'updates   16 between the files',
        'W         0.1853 of the later average was of before',
        'rounding  that of the updates between, enlarged 1.23 times',
        'written   a.pth',
    ]
    arguments = ['--momentum', 0.1, '--restart-at', 2, '-o', 'b.pth', '--plot', 'b.png']
    printed = output_of(TOOL, 'fit', folder, *arguments, folder=tmp_path)
    assert re.search(r'^profile +0\.00% off the wanted one$', printed, re.M)
    assert re.search(r'^coefficients  2 in 2 files, 1\.45 without their signs$', printed, re.M)
    assert (tmp_path / 'b.png').read_bytes().startswith(b'\x89PNG')
    a, b = (torch.load(tmp_path / n, weights_only=True)['state_dict'] for n in ('a.pth', 'b.pth'))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name])
    assert record_in(tmp_path / 'b.pth')['restart_at'] == 2
    printed = output_of(TOOL, 'mean', *epochs[3:], '-o', 'c.safetensors', folder=tmp_path)
    assert 'mean     of the raw weights in 3 files' in printed
    assert 'mmema recalibrate CONFIG FILE -o OUT' in printed


def test_a_bad_fit_is_taken_by_force_alone(run, tmp_path, capsys):
    folder, _ = run
    call = ['fit', folder, '--momentum', 0.45, '-o', 'short.pth']
    text = refusal(TOOL, *call, folder=tmp_path)
    assert re.search(r'the nearest mixture is \d+\.\d% off the wanted profile, more than 10%', text)
    assert text.endswith('--force (force=True) takes it all the same')
    call_here(TOOL, *call, '--force', folder=tmp_path)
    assert record_in(tmp_path / 'short.pth')['momentum'] == 0.45
    call_here(TOOL, 'fit', folder, '--uniform', 2, '-o', 'mean.pth', folder=tmp_path)
    assert record_in(tmp_path / 'mean.pth')['uniform'] == 2


@pytest.mark.parametrize(
    ('arguments', 'reason'),
    [
        ('restart {w}/epoch_6.pth {w}/epoch_2.pth', 'must be earlier in the run than'),
        ('restart {w}/epoch_2.pth none.pth', 'none.pth is no file (seen from'),
        ('restart {w}/epoch_2.pth {w}/epoch_6.pth --momentum 0.2', 'momentum of ema is 0.1, got'),
        ('restart {w}/epoch_2.pth {w}/epoch_6.pth --weights x', "has no average 'x'"),
        ('restart {w}/epoch_2.pth {w}/epoch_6.pth -o a.txt', 'must end in .pth or .safetensors'),
        (
            'restart {w}/epoch_2.pth {w}/epoch_6.pth -o there.pth',
            'exists; --force (force=True) replaces it',
        ),
        ('mean {w}/epoch_2.pth', 'a mean is of at least two files, each once, got'),
        ('fit none --momentum 0.1', 'no folder none'),
        ('fit . --momentum 0.1', 'no checkpoint of a run in .'),
        ('fit {w} --momentum 2', 'fit: momentum must be in (0, 1), got 2.0'),
        (
            'fit {w} --momentum 0.1 --restart-at 6',
            'first iteration must be below the 24 of the run',
        ),
        ('fit {w} --momentum 0.1 --uniform 1', 'fit takes either --momentum M or --uniform FROM'),
        ('fit {w}', 'fit takes either --momentum M or --uniform FROM'),
        ('fit {w} --uniform 1 --gamma 3', 'it takes neither --gamma nor --restart-at'),
        ('choose {w} --config none.py', 'no config file none.py'),
        ('choose {w} --config {w} -o there.pth', 'there.pth exists; --force replaces it'),
        ('choose {w} --config {w}/../toy.py --metric x', 'no metric x was measured; there are'),
    ],
)
def test_refuses(run, tmp_path, arguments, reason):
    (tmp_path / 'there.pth').touch()
    words = arguments.format(w=run[0]).split()
    if '-o' not in words:
        words += ['-o', 'out.pth']
    assert reason in refusal(TOOL, *words, folder=tmp_path)
    assert not (tmp_path / 'out.pth').exists()
    assert (tmp_path / 'there.pth').read_bytes() == b''


def test_what_the_files_do_not_say_is_an_option(run, tmp_path):
    for epoch in (2, 6):
        content = torch.load(run[0] / f'epoch_{epoch}.pth', weights_only=True)
        content['meta']['cfg'] = ''
        torch.save(content, tmp_path / f'{epoch}.pth')
    call = ['restart', '2.pth', '6.pth', '-o', 'out.pth']
    reason = refusal(TOOL, *call, folder=tmp_path)
    assert '`restart` takes --ema-type (ema_type of Given), one of' in reason
    given = ['--ema-type', 'ExponentialMovingAverage', '--momentum', 0.1, '--interval', 1]
    call_here(TOOL, *call, *given, folder=tmp_path)
    assert record_in(tmp_path / 'out.pth')['kept'] == pytest.approx(0.9**16)


def test_files_of_another_run_in_the_folder_are_left_out(run, tmp_path, capsys):
    folder = tmp_path / 'w'
    shutil.copytree(run[0], folder)
    content = torch.load(folder / 'epoch_3.pth', weights_only=True)
    content['meta']['seed'] = 7
    torch.save(content, folder / 'epoch_3.pth')
    call_here(TOOL, 'fit', 'w', '--momentum', 0.1, '-o', 'out.pth', folder=tmp_path)
    (note,) = (line for line in capsys.readouterr().err.splitlines() if 'left out' in line)
    assert 'epoch_3.pth is left out: w/epoch_3.pth and w/epoch_6.pth must be of one run' in note


def test_choose_writes_the_best_of_the_table(run, tmp_path, capsys):
    folder, config = run
    call = [TOOL, 'choose', folder, '--config', config, '-o', 'best.pth']
    call_here(*call, '--report-config', config, folder=tmp_path)
    printed = capsys.readouterr().out
    rows = re.findall(r'^([* ]) (.*?)  +(?:(\d+\.\d%)  +)?(-\d\.\d{4})$', printed, re.M)
    scores = {label: float(score) for _, label, _, score in rows}
    assert list(scores)[:2] == ['ema', 'raw']
    assert 'momentum 0.1, restarted at epoch 4' in scores  # where the pipeline was switched
    assert 'mean of the last 5 raw weights' in scores
    (chosen,) = (label for mark, label, *_ in rows if mark == '*')
    assert scores[chosen] == max(scores.values())
    record = record_in(tmp_path / 'best.pth')
    assert (record['recipe'], record['metric']) == (chosen, 'score')
    assert record['score'] == pytest.approx(scores[chosen], abs=1e-4)
    assert record['candidates'] == len(rows)
    # The file has the weights that were evaluated.
    from runs import Line, LineModel

    model = LineModel()
    model.load_state_dict(torch.load(tmp_path / 'best.pth', weights_only=True)['state_dict'])
    model.eval()
    line = Line(8)
    error = (model(line.x) - line.y).square().mean().item()
    assert record['score'] == pytest.approx(-error, rel=1e-5)
    line = Line(12)
    error = (model(line.x) - line.y).square().mean().item()
    assert f'score on the test set of toy.py: {-error:.4f}  {chosen}\n' in printed
    assert re.search(r'score on the test set of toy.py: -\d\.\d{4}  ema as stored', printed)


def test_choose_on_measured_statistics(run, tmp_path, capsys):
    folder, config = run
    call = [TOOL, 'choose', folder, '--config', config, '-o', 'best.pth', '--restart-at', 3]
    call_here(*call, '--batches', 2, folder=tmp_path)
    printed = capsys.readouterr().out
    assert 'momentum 0.1, restarted at epoch 3' in printed
    assert f'report it on another one: mmema test {config} best.pth' in printed
    from runs import Line

    state = torch.load(tmp_path / 'best.pth', weights_only=True)['state_dict']
    x = Line(16).x[:8].view(2, 4, 3)
    torch.testing.assert_close(state['norm.running_mean'], x.mean((0, 1)))
    torch.testing.assert_close(state['norm.running_var'], x.var(1).mean(0))
