"""tools/ema_checkpoint.py as people call it, and every command of docs/checkpoints.md."""

import pickle
import re
import shlex

import pytest
import torch
from runs import EMA, ema_of, make_runner
from tool_runs import ROOT, call_here, call_tool
from toys import Toy

DOCS = ROOT / 'docs' / 'checkpoints.md'
TOOL = 'ema_checkpoint.py'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A real run with our average; 8 iterations."""
    folder = tmp_path_factory.mktemp('run')
    runner = make_runner(folder, epochs=2, ema={**EMA, 'update_buffers': True})
    runner.train()
    return runner, folder / 'epoch_2.pth'


@pytest.fixture
def tool(tmp_path, monkeypatch, capsys):
    """Call the tool in this process, in ``tmp_path``; return exit status and output."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = 0
        try:
            call_here(TOOL, *arguments, folder=tmp_path)
        except SystemExit as error:
            status = error.code
        return status, ''.join(capsys.readouterr())

    return call


# --- as another process ------------------------------------------------------------------------


def test_each_command_from_any_folder(run, tmp_path):
    runner, file = run
    done = call_tool(TOOL, 'inspect', file, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r'made by +MMEngine 0\.10', done.stdout)
    assert re.search(r"raw weights +ema_state_dict\['module\.\*'\]: ", done.stdout)
    assert re.search(r'updates +8\n +schedule +exp\n', done.stdout)
    assert re.search(r'trained +epoch 2, iteration 8\n', done.stdout)
    done = call_tool(TOOL, 'export', file, '--weights', 'raw', '-o', 'x.pth', folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (out,) = tmp_path.glob('x-????????.pth')
    assert f'raw weights of {file}: {out.name}' in done.stdout
    state = torch.load(out, weights_only=True)['state_dict']
    for name, tensor in runner.model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    done = call_tool(TOOL, 'convert', out.name, '--steps', 8, '-o', 'y.pth', folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f'{out.name} converted: y.pth\n' in done.stdout
    again = call_tool(TOOL, 'convert', out.name, '--steps', 8, '-o', 'y.pth', folder=tmp_path)
    assert (again.returncode, again.stdout) == (2, '')
    assert again.stderr == f'{TOOL}: y.pth exists; --force replaces it\n'


# --- in this process ---------------------------------------------------------------------------


def test_convert_says_what_it_assumed(tool, tmp_path):
    torch.save({'start_epoch': 3, 'model': Toy().state_dict()}, tmp_path / 'x.pth')
    status, text = tool('convert', 'x.pth', '--steps', 90, '-o', 'y.pth')
    assert (status, text.splitlines()[0]) == (0, 'x.pth converted: y.pth')
    assert '  note: no raw weights in the file: training goes on from the average' in text
    assert int(torch.load('y.pth', weights_only=True)['ema_state_dict']['steps']) == 90


def test_a_refused_pickle_is_one_line(tool, tmp_path):
    with open(tmp_path / 'x.pth', 'wb') as file:
        pickle.dump({'state_dict': 1}, file, 4)
    status, text = tool('inspect', 'x.pth')
    assert status == 2
    (line,) = text.splitlines()
    assert line.startswith(f'{TOOL}: x.pth: it is damaged, cut short or no checkpoint at all')


def test_all_options_of_convert_arrive(tool, tmp_path):
    torch.save({'model': None, 'ema': Toy(), 'updates': 5}, tmp_path / 'x.pt')
    (tmp_path / 'y.pth').write_text('old')
    status, text = tool('convert', 'x.pt', *['--trust', '--steps', '7', '--force', '-o', 'y.pth'])
    assert status == 0, text
    assert int(torch.load('y.pth', weights_only=True)['ema_state_dict']['steps']) == 7


def test_exact_name_and_force(run, tool):
    assert tool('export', run[1], '-o', 'x.pth', '--exact-name')[0] == 0
    status, text = tool('export', run[1], '-o', 'x.pth', '--exact-name')
    assert (status, text) == (2, f'{TOOL}: x.pth exists; --force replaces it\n')
    assert tool('export', run[1], '-o', 'x.pth', '--exact-name', '--force')[0] == 0


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ('', 'the following arguments are required: COMMAND'),
        ('inspect', 'the following arguments are required: file'),
        ('inspekt x', 'invalid choice'),
        ('inspect no.pth', 'no.pth is no file (seen from '),
        ('inspect .', '. is no file (seen from '),
        ('export RUN', 'the following arguments are required: -o/--output'),
        ('export RUN --weights best -o x.pth', 'invalid choice'),
        ('export RUN -o x.onnx', 'the new file must end in .pth or .safetensors, got x.onnx'),
        ('export RUN -o no/x.pth', 'x.pth cannot be written: '),
        ('convert RUN --steps x -o x.pth', "invalid int value: 'x'"),
    ],
)
def test_bad_calls_end_with_status_2_and_one_line(run, tool, tmp_path, arguments, expected):
    status, text = tool(*(run[1] if word == 'RUN' else word for word in arguments.split()))
    assert status == 2
    assert expected in text.splitlines()[-1]
    assert 'Traceback' not in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('command', ['inspect', 'export', 'convert'])
@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ({'state_dict': {'a': torch.zeros(1)}, 'meta': 'x'}, "meta must be a dict, got 'x'"),
        ({'a': torch.eye(2).to_sparse()}, "the file: 'a' is sparse, nested, quantized"),
    ],
)
def test_odd_contents_end_with_status_2_and_one_line(tool, tmp_path, command, content, expected):
    torch.save(content, tmp_path / 'x.pth')
    words = command.split()
    output = [] if command == 'inspect' else ['-o', 'y.pth']
    status, text = tool(words[0], 'x.pth', *words[1:], *output)
    assert status == 2
    (line,) = text.splitlines()
    assert line.startswith(f'{TOOL}: x.pth: {expected}')
    assert [path.name for path in tmp_path.iterdir()] == ['x.pth']


# --- docs/checkpoints.md -----------------------------------------------------------------------


def commands_of_the_page():
    blocks = re.findall(r'```console\n(.*?)```', DOCS.read_text(), re.S)
    lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
    return [line[2:] for line in lines if line.startswith('$ ')]


def test_every_command_of_the_page_does_what_it_says(run, tool, tmp_path):
    (tmp_path / 'work_dirs' / 'digits').mkdir(parents=True)
    (tmp_path / 'work_dirs/digits/epoch_5.pth').write_bytes(run[1].read_bytes())
    state, average = Toy().state_dict(), Toy().state_dict()
    for name, content in {
        'dfine.pth': {'model': state, 'ema': {'module': average, 'updates': 5}, 'last_epoch': 1},
        'yolox.pth': {'model': average, 'start_epoch': 20},
        'yolov5.pt': {'model': None, 'ema': Toy(), 'updates': 5},
    }.items():
        torch.save(content, tmp_path / name)
    commands = commands_of_the_page()
    assert len(commands) >= 7
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == 'tools/ema_checkpoint.py', command
        status, text = tool(*arguments)
        refused = 'yolov5.pt' in command and '--trust' not in command
        assert status == (2 if refused else 0), f'{command}\n{text}'
        assert ('--trust' in text) == refused


def test_python_of_the_page_runs(run, tool, tmp_path):
    from safetensors.torch import save_file

    save_file(run[0].model.state_dict(), tmp_path / 'digits-d56c4fb1.safetensors')
    (tmp_path / 'work_dirs' / 'digits').mkdir(parents=True)
    (tmp_path / 'work_dirs/digits/epoch_5.pth').write_bytes(run[1].read_bytes())
    blocks = re.findall(r'```python\n(.*?)```', DOCS.read_text(), re.S)
    assert blocks
    for block in blocks:
        exec(block, {'model': run[0].model, 'average': ema_of(run[0])})
