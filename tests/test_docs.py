"""Every code block, link, file name and public name of the pages, and the docstrings' examples.

The commands and the Python of docs/checkpoints.md need checkpoints of several codes;
cli/test_checkpoint.py has them and runs that page. The table of docs/migration.md is run by
test_restartable.py.
"""

import argparse
import ast
import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
from contextlib import contextmanager
from math import exp
from pathlib import Path
from unittest.mock import patch

import pytest
import runs
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from tool_runs import ROOT, call_tool
from torch.distributed.run import get_args_parser as torchs_parser
from wheels import PIP_INSTALL, call, copy_sources

import mmema
from mmema.cli.main import COMMANDS, main

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md')])
}
RUN_ELSEWHERE = {  # see above; test_design.py has the picture
    'docs/checkpoints.md': {'console', 'python'},
    'docs/design.md': {'mermaid'},
}
SLOW = {'bash', 'text'}
# Their arguments are only parsed.
SCRIPTS = {f'tools/{name}.py' for name in ('make_digits', 'test', 'train')}
SCRIPTS |= {'benchmarks/update_cost.py', 'benchmarks/sharded_cost.py'}
OTHERS = {  # files of MMYOLO and MMEngine, named as theirs
    'tools/model_converters',
    'tests/test_model/test_averaged_model.py',
    'tests/test_hooks/test_ema_hook.py',
}
OF_EARLIER_VERSIONS = {'CHANGELOG.md', 'docs/upgrading.md'}  # name what is gone
OTHERS_TESTS = {'docs/upstream.md'}  # names tests of MMEngine
FOLDERS = ('benchmarks', 'configs', 'docs', 'examples', 'mmema', 'requirements', 'tests', 'tools')
NUMBER = r'-?\d[\d.,:]*(?:e[+-]\d+)?'

FENCE = re.compile(r'^( *)(```+|~~~+)([^\n]*)\n(.*?)^\1\2 *$', re.M | re.S)
INDENTED = re.compile(r'(?:\A|\n\n)((?: {4}\S[^\n]*\n)+)')


def blocks_of(text):
    """Yield line, language and content of each block; one that is only indented holds commands."""
    for block in FENCE.finditer(text):
        yield text[: block.start()].count('\n') + 1, block[3].strip(), block[4]
    plain = FENCE.sub(lambda block: '\n' * block[0].count('\n'), text)
    for block in INDENTED.finditer(plain):
        content = re.sub('^ {4}', '', block[1], flags=re.M)
        yield plain[: block.start(1)].count('\n') + 1, 'bash', content


def blocks():
    for page, text in PAGES.items():
        for line, language, content in blocks_of(text):
            if language not in RUN_ELSEWHERE.get(page, ()):
                name = f'{page}:{line}:{language}'
                slow = [pytest.mark.slow] if language in SLOW and '<-' not in content else []
                yield pytest.param(page, language, content, id=name, marks=slow)


@pytest.mark.parametrize('page, language, content', list(blocks()))
def test_block(page, language, content, tmp_path, monkeypatch, request):
    known = {'python': python_block, 'bash': bash_block, 'text': text_block}
    assert language in known, f'{page}: no test knows what to do with a block of {language!r}'
    if language == 'bash':
        pytest.importorskip('mmyolo')  # commands import it
    monkeypatch.chdir(tmp_path)
    known[language](page, content, tmp_path, request)


# --- Python ------------------------------------------------------------------------------------


def python_block(page, content, folder, request):
    tree = ast.parse(content)
    if any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body):
        exec(compile(content, page, 'exec'), {'__name__': 'page'})
        return
    assert all(isinstance(node, ast.Assign) for node in tree.body), 'a config assigns, and no more'
    if re.search('mmyolo|mmdet|PipelineSwitchHook', content):
        pytest.importorskip('mmyolo')
    config = load_config(page, content, folder)
    hooks = config.get('custom_hooks', [])
    kinds = {hook.type.rsplit('.', 1)[-1] for hook in hooks}
    if 'EMAHook' not in kinds:
        hooks.append(dict(type='EMAHook', ema_type='mmema.RestartableExpMomentumEMA'))
    follow = next((hook.follow for hook in hooks if 'follow' in hook), None)
    if follow not in {None, *kinds}:  # the page says that the reader's config has it
        assert follow == 'PipelineSwitchHook'
        hooks.append(dict(type='mmdet.PipelineSwitchHook', switch_epoch=2, switch_pipeline=[]))
    runner = runs.plain_runner(
        folder / 'run',
        hooks,
        val_cfg=config.get('val_cfg', {}) if 'EMAValLoop' in content else {},
        default_scope=config.get('default_scope', 'mmengine'),
    )
    runner.train()
    (ema,) = (hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook))
    is_ladder = "horizon='auto'" in content
    kind = mmema.RestartableAnnealingEMA if is_ladder else mmema.RestartableExpMomentumEMA
    assert isinstance(ema, kind)
    expected = 2 if follow and follow not in kinds else 6  # updates since the switch, or in all
    assert int(ema.steps) == expected


def load_config(page, content, folder):
    """Load a config as if it stood beside its page."""
    # Copied: behind a link the digits of the checkout would be found, if it has them.
    shutil.copytree(ROOT / 'configs', folder / 'configs')
    file = folder / Path(page).with_suffix('.py')
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    return Config.fromfile(file)


# --- commands ----------------------------------------------------------------------------------


def bash_block(page, content, folder, request):
    commands = [shlex.split(line) for line in content.replace('\\\n', ' ').splitlines()]
    assert commands and all(commands), f'{page}: a line without a command'
    for program, *arguments in commands:
        if program == 'make':
            call(program, '-n', *arguments, folder=ROOT)
        elif [program, *arguments] == ['pip', 'install', '.']:
            install(folder)
        elif program == 'mim':
            parse_only(mim_arguments(*arguments))
        elif program == 'mmema' and arguments[0] != 'plot':
            parse_command(arguments)
        elif program == 'python' and arguments[0] in SCRIPTS:
            parse_only(arguments)
        elif program == 'python' and arguments[0].startswith('examples/'):
            with parsing_only(), patch.object(sys, 'argv', arguments):
                runpy.run_path(ROOT / arguments[0], run_name='__main__')
        elif program == 'torchrun':
            parsed = torchs_parser().parse_args(arguments)
            parse_only([parsed.training_script, *parsed.training_script_args])
        elif program == 'srun':
            parse_only(arguments[arguments.index('python') + 1 :])
        elif program == 'mmema':
            assert page == 'docs/monitoring.md' or (ROOT / arguments[1]).is_file(), arguments
            done = request.getfixturevalue('shown_run')
            plotted = call_tool(*arguments, folder=done.folder)
            assert plotted.returncode == 0, plotted.stderr
            drawn = done.folder / arguments[arguments.index('-o') + 1]
            assert drawn.read_bytes().startswith(b'\x89PNG')
        else:
            pytest.fail(f'{page}: no test knows how to run {program} {" ".join(arguments)}')


def install(folder):
    """Install a copy of the sources, since a build writes beside them, and import what came out."""
    source, target = copy_sources(folder / 'source'), folder / 'target'
    call(sys.executable, *PIP_INSTALL, '--target', target, '.', folder=source)
    code = 'import mmema; print(mmema.__file__)'
    out = call(sys.executable, '-c', code, folder=folder, PYTHONPATH=str(target))
    assert out.splitlines()[-1] == str(target / 'mmema' / '__init__.py')


@contextmanager
def parsing_only():
    """Let a program parse its arguments, and no more."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*arguments):
        parse(*arguments)
        raise InterruptedError

    stopped = pytest.raises(InterruptedError)
    with stopped, patch('argparse.ArgumentParser.parse_args', parse_and_stop):
        yield


def parse_only(arguments):
    """Let a script parse the arguments of a run that takes long, and no more."""
    with parsing_only(), patch.object(sys, 'argv', arguments):
        runpy.run_path(ROOT / arguments[0], run_name='__main__')
    for argument in arguments[1:]:
        if argument.startswith('configs/'):
            assert (ROOT / argument).is_file(), argument


def mim_arguments(command, package, config, *others):
    """Return the arguments of the tool that `mim train` or `mim test` calls."""
    assert package == 'mmema'
    (file,) = (ROOT / 'configs').rglob(config)  # found by its name in the installed package
    others = [other for other in others if other != '--checkpoint']
    return [f'tools/{command}.py', str(file.relative_to(ROOT)), *others]


def parse_command(arguments):
    """Parse what follows `mmema`."""
    if arguments == ['--help']:
        return
    assert arguments[0] in COMMANDS
    with parsing_only():
        main(arguments)


# --- formulas and quoted output ----------------------------------------------------------------


def text_block(page, content, folder, request):
    if '<-' in content:
        formula_block(content)
        return
    shown = request.getfixturevalue('shown_run').text + request.getfixturevalue('shown_restart')
    for line in content.strip().splitlines():
        assert re.search(as_pattern(line), shown), f'{page}: no run prints a line like\n{line}'


def formula_block(content):
    """Work out three updates as the formulas say."""
    blend, momentum = (re.split('<-|=', line)[1] for line in content.strip().splitlines())
    blend, momentum = (
        compile(re.sub(r'(?<=[\w)]) (?=[a-z(])', ' * ', text.strip()), 'page', 'eval')
        for text in (blend, momentum)
    )
    model = torch.nn.Linear(1, 1, bias=False).double()
    ema = mmema.RestartableExpMomentumEMA(model, momentum=0.1, gamma=3)
    for steps, src in enumerate([2.0, 5.0, -1.0]):
        torch.nn.init.constant_(model.weight, src)
        m = eval(momentum, dict(exp=exp, momentum=0.1, gamma=3, steps=steps))
        assert ema.current_momentum == (pytest.approx(m) if steps else 1)
        avg = eval(blend, dict(m=m, avg=avg, src=src)) if steps else src  # noqa: F821
        ema.update_parameters(model)
        assert ema.module.weight.item() == pytest.approx(avg)


def as_pattern(line):
    """Return what matches the line with any other numbers and any other width of its gaps."""
    number = re.compile(rf'(?<![A-Za-z\d])(?<!mAP_){NUMBER}')
    words = number.split(re.sub(r'\s+', ' ', line))
    return rf'\s*{NUMBER}'.join(re.escape(word).replace(r'\ ', r'\s+') for word in words)


class Shown:
    def __init__(self, folder, text):
        self.folder, self.text = folder, text


@pytest.fixture(scope='module')
def shown_run(tmp_path_factory):
    """The run of docs/monitoring.md, two epochs of two iterations, as its reader starts it."""
    import make_digits

    folder = tmp_path_factory.mktemp('page')
    page = 'docs/monitoring.md'
    content = next(c for _, language, c in blocks_of(PAGES[page]) if language == 'python')
    load_config(page, content, folder)
    make_digits.make_digits(folder / 'data' / 'digits', train=32, val=8, test=1)
    options = (
        'train_cfg.max_epochs=2 train_cfg.val_interval=1 custom_hooks.1.switch_epoch=1 '
        'default_hooks.param_scheduler.max_epochs=2 '
        'train_dataloader.num_workers=0 train_dataloader.persistent_workers=False'
    )
    command = 'docs/monitoring.py --work-dir work_dirs/digits --cfg-options'
    done = call_tool('train', *command.split(), *options.split(), folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    text = re.sub(r'memory: \d+ +', '', done.stdout + done.stderr)  # a column of GPUs
    return Shown(folder, text)


@pytest.fixture(scope='module')
def shown_restart(tmp_path_factory):
    """The log of a run that restarts as docs/restarts.md quotes it."""
    hook = dict(type='mmema.EMARestartHook', milestones=[2], momentum=0.02, gamma=9)
    runner = runs.make_runner(tmp_path_factory.mktemp('restart'), hook, epochs=3)
    runner.train()
    return runs.log_of(runner)


@pytest.mark.slow
def test_the_quoted_restart_is_that_of_the_toy_to_the_last_number(shown_restart):
    (quoted,) = (c for _, kind, c in blocks_of(PAGES['docs/restarts.md']) if kind == 'text')
    assert quoted.strip() in shown_restart


# --- links, names ------------------------------------------------------------------------------


def prose(page):
    """Return a page without its blocks."""
    return FENCE.sub('', PAGES[page])


def spans(page):
    return re.findall(r'`([^`]+)`', prose(page))


def anchors(path):
    """Return the anchors that GitHub gives the headings of a page."""
    text = FENCE.sub('', path.read_text())
    titles = re.findall(r'^#+ +(.*?) *$', text, re.M)
    return {re.sub(r'[^\w\- ]', '', title).lower().replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', PAGES)
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r'`[^`]+`', '', prose(page))
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'\w+:', link):
            continue
        file, _, anchor = link.partition('#')
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize('page', sorted(set(PAGES) - OF_EARLIER_VERSIONS))
def test_files_and_tests_that_a_page_names_exist(page):
    every_file = {path.name for top in FOLDERS for path in (ROOT / top).rglob('*')}
    tests = ''.join(path.read_text() for path in (ROOT / 'tests').rglob('test_*.py'))
    targets = re.findall(r'^([a-z]+):', (ROOT / 'Makefile').read_text(), re.M)
    for span in spans(page):
        for word in span.split():
            path = word.partition('::')[0]
            if re.match(f'({"|".join(FOLDERS)})/', path):
                assert path in OTHERS or any(ROOT.glob(path.rstrip('/'))), word
            elif re.fullmatch(r'\w+\.(py|md)', path):
                assert path in every_file or (ROOT / path).is_file(), word
            name = re.search(r'(?:^|::)(test_\w+)$', word)
            if name and page not in OTHERS_TESTS:
                assert f'def {name[1]}(' in tests, word
        if re.match('make [a-z]', span):
            assert span.split()[1] in targets, span


@pytest.mark.parametrize('page', sorted(set(PAGES) - OF_EARLIER_VERSIONS))
def test_names_of_the_package_exist(page):
    for name in re.findall(r'\bmmema(?:\.[A-Za-z_]\w*)+(?:\.\.\.)?', PAGES[page]):
        if not name.endswith('...'):
            pkgutil.resolve_name(name)


@pytest.mark.parametrize('name', [name for name in mmema.__all__ if name != '__version__'])
def test_every_public_name_is_on_a_page(name):
    assert any(re.search(rf'\b{name}\b', text) for text in PAGES.values())


# --- docstrings --------------------------------------------------------------------------------

MODULES = [info.name for info in pkgutil.walk_packages(mmema.__path__, 'mmema.')]


@pytest.mark.parametrize('name', ['mmema', *MODULES])
def test_examples_of_the_docstrings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0
    # None stands where doctest does not look, such as behind a decorator that hides it.
    assert result.attempted == Path(module.__file__).read_text().count('>>> ')
