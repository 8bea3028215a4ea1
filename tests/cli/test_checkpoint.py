"""mmema inspect, export, best and convert, and every command of docs/checkpoints.md."""

import json
import math
import pickle
import re
import shlex
import shutil
import time

import pytest
import torch
from marks import SINCE_TORCH_2_6
from mmengine.config import Config
from mmengine.hooks import Hook
from runs import EMA, LineModel, ema_of, loader, make_runner
from tool_runs import ROOT, call_here, output_of, refusal
from toys import Toy

pytestmark = SINCE_TORCH_2_6

DOCS = ROOT / 'docs' / 'checkpoints.md'
TOOL = 'mmema'


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
            call_here(*arguments, folder=tmp_path)
        except SystemExit as error:
            status = error.code
        return status, ''.join(capsys.readouterr())

    return call


def test_each_command_from_any_folder(run, tmp_path):
    runner, file = run
    printed = output_of('inspect', file, folder=tmp_path)
    assert re.search(r'made by +MMEngine 0\.10', printed)
    assert re.search(r"raw weights +ema_state_dict\['module\.\*'\]: ", printed)
    assert re.search(r'updates +8\n +schedule +exp\n', printed)
    assert re.search(r'trained +epoch 2, iteration 8\n', printed)
    printed = output_of('export', file, '--weights', 'raw', '-o', 'x.pth', folder=tmp_path)
    (out,) = tmp_path.glob('x-????????.pth')
    assert f'raw weights of {file}: {out.name}' in printed
    state = torch.load(out, weights_only=True)['state_dict']
    for name, tensor in runner.model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    call = ['convert', out.name, '--steps', 8, '-o', 'y.pth']
    assert f'{out.name} converted: y.pth\n' in output_of(*call, folder=tmp_path)
    line = f'{TOOL}: y.pth exists; --force (force=True) replaces it'
    assert refusal(*call, folder=tmp_path) == line


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
    assert (status, text) == (2, f'{TOOL}: x.pth exists; --force (force=True) replaces it\n')
    assert tool('export', run[1], '-o', 'x.pth', '--exact-name', '--force')[0] == 0


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        ('inspect', 'the following arguments are required: file'),
        ('inspekt x', 'no command inspekt; there are train, test, plot, inspect'),
        ('inspect no.pth', 'no.pth is no file (seen from '),
        ('inspect .', '. is no file (seen from '),
        ('export RUN', 'the following arguments are required: -o/--output'),
        ('export RUN --weights best -o x.pth', 'has no best weights; it has ema, raw'),
        ('best no -o x.pth', 'no folder no'),
        ('best . -o x.pth', 'no validation in ./*/vis_data/scalars.json: it takes the folder of'),
        ('best . --rule more -o x.pth', 'invalid choice'),
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


# --- the best of a run -------------------------------------------------------------------------


ALSO = dict(short=dict(momentum=0.5), long=dict(momentum=0.01))
SEVERAL = dict(
    ema=dict(EMA, type='mmema.EMAHook', also=ALSO), val_cfg=dict(type='mmema.EMAValLoop')
)
MAP = 'coco/bbox_mAP'


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    """The folder of a run with several averages: 3 epochs of 4 iterations, all checkpoints kept."""
    folder = tmp_path_factory.mktemp('several')
    make_runner(folder, epochs=3, checkpoint=dict(save_best=None), **SEVERAL).train()
    return folder


@pytest.fixture
def folder(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / 'run')


def score(folder, *epochs, metric=MAP):
    """Replace the scores in the log of a run: a dict by name of the weights for each epoch."""
    (log,) = folder.glob('*/vis_data/scalars.json')
    points = [point for point in map(json.loads, log.read_text().splitlines()) if 'iter' in point]
    for epoch, scores in enumerate(epochs, 1):
        named = {metric if k == 'ema' else f'{k}/{metric}': v for k, v in scores.items()}
        points.append(dict(named, time=9.0, data_time=9.0, step=epoch))
    # Validations follow the training of their epoch.
    points.sort(key=lambda p: p['step'] if 'iter' in p else 4 * p['step'] + 0.5)
    log.write_text(''.join(json.dumps(point) + '\n' for point in points))


def change(folder, name, **meta):
    content = torch.load(folder / name, weights_only=True)
    content['meta'].update(meta)
    torch.save(content, folder / name)


def record_of(tmp_path):
    (out,) = tmp_path.glob('out-*.pth')
    return torch.load(out, weights_only=True)['meta']['mmema']


LOW = dict(ema=0.3, raw=0.2, short=0.1, long=0.25)


@pytest.mark.parametrize(
    ('epochs', 'best', 'options'),
    [
        ([LOW, dict(LOW, short=0.5), dict(LOW, ema=0.4)], ('short', 2, 0.5), ''),
        ([dict(LOW, raw=0.9), LOW, dict(LOW, ema=0.4)], ('raw', 1, 0.9), ''),
        ([dict(LOW, ema=math.nan), LOW, dict(LOW, ema=0.4)], ('ema', 3, 0.4), ''),
        ([LOW, dict(LOW, long=0.01), LOW], ('long', 2, 0.01), '--rule less'),
        # The main average found nothing, as in the first epochs.
        ([dict(raw=0.01), {}, dict(LOW, ema=0.001)], ('long', 3, 0.25), ''),
    ],
)
def test_best_is_the_best_of_all_weights_and_epochs(tool, folder, tmp_path, epochs, best, options):
    score(folder, *epochs)
    status, text = tool('best', folder, '-o', 'out.pth', *options.split())
    name, epoch, value = best
    assert status == 0, text
    assert text.startswith(f'{MAP} {value:g}: {name} weights, epoch {epoch}; best of ')
    saved = torch.load(folder / f'epoch_{epoch}.pth', weights_only=True)
    state = {
        'ema': saved['state_dict'],
        'raw': {k[7:]: v for k, v in saved['ema_state_dict'].items() if k[:7] == 'module.'},
        **{
            name: {k[7:]: v for k, v in also['state_dict'].items() if k[:7] == 'module.'}
            for name, also in saved['ema_also'].items()
        },
    }[name]
    (out,) = tmp_path.glob('out-*.pth')
    exported = torch.load(out, weights_only=True)['state_dict']
    assert list(exported) == list(saved['state_dict']) and len(exported) == 10
    assert all(torch.equal(tensor, state[key]) for key, tensor in exported.items())
    steps = None if name == 'raw' else 4 * epoch
    record = record_of(tmp_path)
    if name != 'raw':
        assert record.pop('steps') == steps
    record.pop('steps', None)
    assert record == dict(weights=name, metric=MAP, score=value, epoch=epoch)


def test_best_is_what_it_scores(tool, tmp_path):
    """In a resumed run, whose log has two parts, against the score worked out from the file."""
    settings = dict(checkpoint=dict(save_best=None), **SEVERAL)
    make_runner(tmp_path / 'run', epochs=2, **settings).train()
    runner = make_runner(tmp_path / 'run', epochs=4, resume=True, **settings)
    runner.train()
    status, text = tool('best', 'run', '-o', 'out.pth', '--rule', 'greater')
    assert status == 0 and '; best of 16\n' in text, text
    (out,) = tmp_path.glob('out-*.pth')
    model, data = LineModel().eval(), runner.val_dataloader.dataset
    model.load_state_dict(torch.load(out, weights_only=True)['state_dict'])
    by_hand = -(model(data.x) - data.y).square().mean().item()
    assert record_of(tmp_path)['score'] == pytest.approx(by_hand, abs=1e-5)
    assert tool('inspect', out)[1].count('exported by mmema: weights ') == 1


class Stop(Hook):
    """Ends a run as a signal would, after the validation of an epoch."""

    priority = 'LOWEST'

    def __init__(self, epoch):
        self.epoch = epoch

    def after_val_epoch(self, runner, metrics=None):
        if runner.epoch == self.epoch:
            raise KeyboardInterrupt


SCRIPT = [None, 0.1, 0.2, 0.9, 0.3, 0.8, 0.4, 0.7, 0.5, 0.6]


@pytest.mark.parametrize('kind', ['mmema.EMAHook', 'EMAHook'])
def test_best_after_a_resume_with_another_batch_size(tool, tmp_path, kind):
    # Epochs of 4 iterations until the second one is over, then of 2. The validation of epoch 5 is
    # before iteration 14; as multiples of 2 it was that of epoch 7, and with 4 of none.
    average = {**EMA, 'type': kind}
    if kind == 'EMAHook':
        average = dict(type=kind, ema_type='ExponentialMovingAverage', momentum=0.1)
    for epochs, batch in ((2, 6), (7, 12)):
        settings = dict(epochs=7, script=SCRIPT, checkpoint=dict(save_best=None))
        runner = plain_run(tmp_path / 'run', average, batch, resume=batch > 6, **settings)
        if batch == 6:
            runner.register_hook(Stop(epochs))
            with pytest.raises(KeyboardInterrupt):
                runner.train()
            time.sleep(1.1)  # MMEngine names the folder of a log by the second
        else:
            runner.train()
    for epoch, score_of_it in ((3, 0.9), (5, 0.8), (7, 0.7)):
        status, text = tool('best', 'run', '-o', 'out.pth', '--rule', 'greater', '--force')
        assert status == 0, text
        assert f'score {score_of_it:g}: ema weights, epoch {epoch}; best of ' in text, text
        file = tmp_path / 'run' / f'epoch_{epoch}.pth'
        assert torch.load(file, weights_only=True)['meta']['iter'] == 8 + 2 * (epoch - 2)
        assert 'left out' not in text
        file.unlink()
    shutil.rmtree(tmp_path / 'run')


def plain_run(folder, average, batch, **settings):
    settings.setdefault('cfg', Config(dict(custom_hooks=[average], val_cfg=dict())))
    return make_runner(folder, ema=average, train_dataloader=loader(batch), **settings)


def test_a_file_from_the_middle_of_an_epoch_has_no_score(tool, tmp_path):
    checkpoint = dict(save_best=None, by_epoch=False, interval=3)
    runner = make_runner(tmp_path / 'run', epochs=3, script=SCRIPT, checkpoint=checkpoint)
    runner.train()
    status, text = tool('best', 'run', '-o', 'out.pth', '--rule', 'greater')
    assert status == 0 and 'score 0.9: ema weights, epoch 3; best of 1\n' in text, text
    assert 'left out, since no score was logged: iter_3.pth, iter_6.pth, iter_9.pth\n' in text


def test_best_finds_files_of_any_name_and_a_metric_called_loss(tool, folder, tmp_path):
    score(folder, LOW, dict(LOW, short=0.05), LOW, metric='loss')
    for epoch in (1, 2, 3):
        (folder / f'epoch_{epoch}.pth').rename(folder / f'ck_{epoch}.pt')
    (folder / 'last_checkpoint').write_text(str(folder / 'ck_3.pt'))
    status, text = tool('best', folder, '-o', 'out.pth')
    assert (status, text.splitlines()[0]) == (0, 'loss 0.05: short weights, epoch 2; best of 12')


@pytest.mark.parametrize('val_cfg', [True, False])
def test_an_average_with_the_name_of_a_metrics_prefix(tool, tmp_path, val_cfg):
    # Without EMAValLoop the metric coco/mAP is that of the main average alone.
    also = dict(coco=dict(momentum=0.5))
    settings = dict(SEVERAL) if val_cfg else {}
    settings['ema'] = dict(EMA, type='mmema.EMAHook', also=also)
    make_runner(tmp_path / 'run', epochs=2, checkpoint=dict(save_best=None), **settings).train()
    weights = ('raw', 'coco') if val_cfg else ()
    scores = [
        {'ema': 0.3, **dict.fromkeys(weights, 0.2)},
        {'ema': 0.4, **dict.fromkeys(weights, 0.1)},
    ]
    score(tmp_path / 'run', *scores, metric='coco/mAP')
    status, text = tool('best', 'run', '-o', 'out.pth')
    number = 6 if val_cfg else 2
    assert status == 0
    assert f'coco/mAP 0.4: ema weights, epoch 2; best of {number}\n' in text


def test_best_says_what_it_leaves_out(tool, folder, tmp_path):
    score(folder, LOW, dict(LOW, short=0.5), dict(LOW, long=0.4), dict(LOW, long=0.35))
    (folder / 'epoch_2.pth').unlink()
    (folder / 'last_checkpoint').unlink()
    change(folder, 'epoch_1.pth', iter=6)  # two iterations after the validation
    other = shutil.copy(folder / 'epoch_3.pth', folder / 'other_run.pth')
    change(folder, other.name, experiment_name='x_20200101_000000')
    (folder / 'cut.pth').write_bytes(other.read_bytes()[:999])
    assert tool('export', other, '-o', folder / 'exported.pth')[0] == 0
    status, text = tool('best', folder, '-o', 'out.pth')
    assert status == 0
    assert record_of(tmp_path)['epoch'] == 3 and record_of(tmp_path)['weights'] == 'long'
    assert '; best of 4\n' in text
    assert f'left out, since no {MAP} was logged: epoch_1.pth, other_run.pth\n' in text
    assert 'cut.pth is cut short and left out' in text and 'exported' not in text
    assert f'no checkpoint is left of the best, short/{MAP} 0.5 at step 2\n' in text


def test_best_of_a_run_without_an_average(tool, folder, tmp_path):
    score(folder, dict(ema=0.1), dict(ema=0.3), dict(ema=0.2))
    for file in folder.glob('*.pth'):
        content = torch.load(file, weights_only=True)
        del content['ema_state_dict'], content['ema_also']
        torch.save(content, file)
    status, text = tool('best', folder, '-o', 'out.pth')
    assert (status, text.splitlines()[0]) == (0, f'{MAP} 0.3: raw weights, epoch 2; best of 3')
    assert record_of(tmp_path)['weights'] == 'raw'


def test_best_finds_checkpoints_in_a_folder_of_their_own(tool, folder, tmp_path):
    score(folder, LOW, dict(LOW, short=0.5), LOW)
    (tmp_path / 'out').mkdir()
    for file in folder.glob('*.pth'):
        shutil.move(file, tmp_path / 'out')
    (folder / 'last_checkpoint').write_text(str(tmp_path / 'out' / 'epoch_3.pth'))
    assert tool('best', folder, '-o', 'out.pth')[0] == 0
    assert (record_of(tmp_path)['weights'], record_of(tmp_path)['epoch']) == ('short', 2)


def test_best_of_a_run_by_iterations(tool, tmp_path):
    settings = dict(iters=10, val_interval=5, checkpoint=dict(interval=5), **SEVERAL)
    hooks = dict(logger=dict(type='LoggerHook', interval=2, log_metric_by_epoch=False))
    for name, logger in (('run', hooks['logger']), ('epochs', dict(interval=2))):
        runner = make_runner(tmp_path / name, **settings)
        for hook in runner.hooks:
            if type(hook).__name__ == 'LoggerHook':
                hook.log_metric_by_epoch = logger.get('log_metric_by_epoch', True)
        runner.train()
    status, text = tool('best', 'run', '-o', 'out.pth', '--rule', 'greater')
    assert status == 0 and ' weights, iter 10; best of 8\n' in text, text
    assert record_of(tmp_path)['iter'] == 10
    status, text = tool('best', 'epochs', '-o', 'y.pth', '--rule', 'greater')
    assert status == 2 and 'at step 0 (if 0: set log_metric_by_epoch=False' in text


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('--metric bbox_mAP', f'no metric bbox_mAP was measured; there are {MAP}'),
        (f'--metric raw/{MAP}', f'no metric raw/{MAP} was measured; there are {MAP}'),
        ('', f'no checkpoint in RUN is of a validation with {MAP}; validations were logged at'),
    ],
)
def test_refusals_of_best_are_one_line(tool, folder, tmp_path, options, message):
    score(folder, *[{}] * 7, LOW)  # at epoch 8
    status, text = tool('best', folder, '-o', 'out.pth', *options.split())
    assert status == 2 and not list(tmp_path.glob('out*'))
    (line,) = text.splitlines()
    assert line.startswith(f'{TOOL}: {message.replace("RUN", str(folder))}')


def test_best_without_checkpoints_or_rule(tool, folder):
    score(folder, LOW, metric='score')
    line = f'{TOOL}: is more of score better? Give --rule greater or --rule less\n'
    assert tool('best', folder, '-o', 'out.pth') == (2, line)
    for file in (*folder.glob('*.pth'), folder / 'last_checkpoint'):
        file.unlink()
    line = f'{TOOL}: no checkpoint of a run in {folder}\n'
    assert tool('best', folder, '-o', 'out.pth') == (2, line)


def test_the_metric_is_that_of_save_best(tool, folder, tmp_path):
    (log,) = folder.glob('*/vis_data/scalars.json')
    score(folder, LOW, LOW, LOW)
    log.write_text(log.read_text().replace(f'"{MAP}"', f'"coco/first": 0.3, "{MAP}"'))
    hook = dict(type='CheckpointHook', save_best=[f'short/{MAP}', 'x'], rule=['less', 'greater'])
    config = Config(dict(default_hooks=dict(checkpoint=hook), work_dir='x'))
    change(folder, 'epoch_3.pth', cfg=config.pretty_text)
    status, text = tool('best', folder, '-o', 'out.pth')
    assert (status, text.split(';')[0]) == (0, f'{MAP} 0.1: short weights, epoch 1')


# --- docs/checkpoints.md -----------------------------------------------------------------------


def commands_of_the_page():
    blocks = re.findall(r'```console\n(.*?)```', DOCS.read_text(), re.S)
    lines = ''.join(blocks).replace('\\\n', ' ').splitlines()
    return [line[2:] for line in lines if line.startswith('$ ')]


def test_every_command_of_the_page_does_what_it_says(run, tool, tmp_path):
    folder = shutil.copytree(run[1].parent, tmp_path / 'work_dirs' / 'digits')
    (folder / 'epoch_2.pth').rename(folder / 'epoch_5.pth')
    score(folder, dict(ema=0.1), dict(ema=0.458))
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
        assert program == 'mmema', command
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
    blocks = [block for block in blocks if 'torch.onnx' not in block]  # posthoc/test_digits.py
    assert blocks
    for block in blocks:
        exec(block, {'model': run[0].model, 'average': ema_of(run[0])})
