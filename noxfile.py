"""The stacks that people have, each installed from scratch and tested: ``make stacks``.

    nox --list                        the stacks
    nox -s alone table                one of them
    nox -s alone table -- tests/hooks -k amp      other tests than the quick ones
    JOBS=4 nox                        on more cores

The versions and the counts of all sessions so far stand in one table at the end. The wheel of mmcv
takes minutes to compile; it comes from the cache of ``make setup``.
"""

import json
import os
import shutil
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from xml.etree import ElementTree

import nox

ROOT = Path(__file__).resolve().parent
bootstrap = SourceFileLoader('bootstrap', str(ROOT / 'tools' / 'bootstrap.py')).load_module()

STACKS = ['pinned', 'old', 'fork', 'alone', 'others', 'newest', 'deepspeed']
LIBRARIES = ['torch', 'mmengine', 'onedl-mmengine', 'mmcv', 'mmdet', 'mmyolo']
LIBRARIES += ['mmpretrain', 'mmsegmentation', 'torchvision', 'deepspeed']
# MMPretrain imports torchvision, of which there is no build for the torch of `make setup`.
WITH_VISION = ('torch==2.14.1', 'torchvision==0.29.1')
STACK = ROOT / 'requirements' / 'stack.txt'
TESTS = ['build', 'hypothesis', 'pytest', 'pytest-xdist', 'safetensors', 'scikit-learn']
TESTS += ['tensorboard']
# Of MMEngine, which asks for opencv-python besides; that one needs libGL.
OF_MMENGINE = [
    'addict',
    'matplotlib',
    'numpy',
    'opencv-python-headless',
    'pyyaml',
    'rich',
    'termcolor',
]

nox.options.sessions = [*STACKS, 'table']
nox.options.default_venv_backend = 'venv'
nox.options.error_on_external_run = True


@nox.session(venv_backend='none')
def pinned(session):
    """The stack of `make setup`, on which `make test` runs."""
    folder = ROOT / '.nox' / 'pinned'
    session.run(sys.executable, 'tools/bootstrap.py', str(folder), external=True)
    test(session, folder / 'bin' / 'python')


@nox.session
def old(session):
    """An old torch and an old MMEngine."""
    session.install('setuptools==79.0.1', 'wheel', 'ninja', 'numpy<2', 'torch==2.0.1')
    of_mmengine = set(OF_MMENGINE) - {'numpy', 'opencv-python-headless'}
    session.install(*of_mmengine, *TESTS, 'numpy<2', 'opencv-python-headless<4.11', 'yapf==0.40.1')
    session.install('--no-deps', 'mmengine==0.8.5')
    test(session)


@nox.session
def fork(session):
    """The maintained fork of MMEngine below mmcv, mmdet and mmyolo."""
    install_pinned(session, bootstrap.FORK)
    install_mmema(session, with_dependencies=True)  # must leave the fork as it is
    assert 'mmengine' not in installed(session)
    test(session)


@nox.session
def alone(session):
    """MMEngine and torch, nothing of mmcv."""
    session.install(*bootstrap.BUILD_TOOLS, bootstrap.TORCH, *OF_MMENGINE, 'yapf', *TESTS)
    session.install('--no-deps', bootstrap.OPENMMLAB[0])
    test(session)


@nox.session
def others(session):
    """MMPretrain and MMSegmentation beside mmcv, mmdet and mmyolo; their examples."""
    install_pinned(session, bootstrap.OPENMMLAB[0], *WITH_VISION)
    session.install('einops', 'ftfy', 'importlib-metadata', 'mat4py', 'modelindex', 'regex')
    session.install('--no-deps', 'mmpretrain==1.2.0', 'mmsegmentation==1.2.2')
    names = ('test_other_libraries', 'test_examples', 'hooks/test_ema', 'run/test_facts')
    test(session, which=[f'tests/{name}.py' for name in names])


@nox.session
def newest(session):
    """The newest torch and MMEngine that pip finds."""
    session.install('--upgrade', 'setuptools<81', 'ninja', 'torch', *OF_MMENGINE, 'yapf', *TESTS)
    session.install('--no-deps', '--upgrade', 'mmengine')
    test(session)


@nox.session
def deepspeed(session):
    """The stack of `make setup` and DeepSpeed, which shards by ZeRO."""
    install_pinned(session, bootstrap.OPENMMLAB[0])
    session.install('--no-build-isolation', 'deepspeed==0.16.9')
    test(session, which=['tests/sharded/test_zero.py'])


@nox.session(venv_backend='none')
def table(session):
    """What all sessions so far found."""
    rows = ['| stack | versions | passed | failed | skipped |', '| --- | --- | --- | --- | --- |']
    for name in STACKS:
        file = result_of(name)
        found = json.loads(file.read_text()) if file.exists() else {}
        versions = ', '.join(f'{library} {v}' for library, v in found.get('versions', {}).items())
        counts = [str(found.get(key, '-')) for key in ('passed', 'failed', 'skipped')]
        rows.append(f'| {name} | {versions or "not run"} | {" | ".join(counts)} |')
    print('\n'.join(rows))


# --- parts of the sessions ----------------------------------------------------------------------


def install_pinned(session, mmengine, torch=bootstrap.TORCH, *more):
    """Install the stack of `make setup` with this MMEngine, and perhaps another torch."""
    session.install(*bootstrap.BUILD_TOOLS)
    session.install(torch, *more, *bootstrap.BUILD_TOOLS, '-r', str(STACK))
    wheel = bootstrap.mmcv_wheel(Path(session.bin) / 'python', torch)
    session.install('--no-deps', str(wheel), mmengine, *bootstrap.OPENMMLAB[1:])


def install_mmema(session, python='python', with_dependencies=False):
    """Install mmema from a wheel."""
    shutil.rmtree(ROOT / 'build', ignore_errors=True)  # modules that are gone would come back
    few = [] if with_dependencies else ['--no-deps']
    run(session, python, '-m', 'pip', 'install', *few, '--no-build-isolation', str(ROOT))


def test(session, python='python', which=('-m', 'not slow and not extensive', 'tests')):
    """Run the quick tests, or those of the arguments; keep what they found for the table."""
    install_mmema(session, python)
    xml, result = result_of(session.name, '.xml'), result_of(session.name)
    xml.parent.mkdir(parents=True, exist_ok=True)
    for file in (xml, result):
        file.unlink(missing_ok=True)
    which = session.posargs or which
    options = ['-q', '-n', os.environ.get('JOBS', '2'), '--dist', 'loadfile', f'--junitxml={xml}']
    run(session, python, '-m', 'pytest', *options, *which, success_codes=range(6))
    if not xml.exists():
        session.error('pytest wrote no results')
    suite = ElementTree.parse(xml).getroot().find('testsuite')
    count = {key: int(suite.get(key)) for key in ('tests', 'failures', 'errors', 'skipped')}
    failed = count['failures'] + count['errors']
    found = {
        'versions': installed(session, python),
        'passed': count['tests'] - failed - count['skipped'],
        'failed': failed,
        'skipped': count['skipped'],
    }
    result.write_text(json.dumps(found))
    if failed or not found['passed']:
        session.error(f'{failed} tests failed, {found["passed"]} passed')


def installed(session, python='python'):
    """Return the versions of Python and of the installed libraries."""
    code = (
        'import importlib.metadata as m, json, platform\n'
        'all = {d.metadata["Name"]: d.version for d in m.distributions()}\n'
        f'found = {{n: all[n] for n in {LIBRARIES} if n in all}}\n'
        'print(json.dumps({"Python": platform.python_version(), **found}))'
    )
    return json.loads(run(session, python, '-c', code, silent=True))


def run(session, python, *arguments, **options):
    # -P: mmema is the installed one, not that of this folder.
    call = [str(python), '-P', *arguments]
    return session.run(*call, env={'OMP_NUM_THREADS': '1'}, external=True, **options)


def result_of(name, suffix='.json'):
    return ROOT / '.nox' / 'results' / f'{name}{suffix}'
