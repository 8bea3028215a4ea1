#!/usr/bin/env python3
"""Set up the real stack (torch, mmcv with compiled ops, mmdet, mmyolo) for this checkout.

Run by ``make setup``; needs nothing but Python and a C++ compiler. Each step is done once and
remembered inside the virtual environment, so a second call is instant and an interrupted one goes
on where it stopped. The compiled mmcv wheel, which takes minutes, stays in the user's cache folder
for the next checkout.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH = 'torch==2.13.0'
MMCV = 'mmcv==2.0.1'
# Without setuptools 80 there is no `pkg_resources`, which mmengine and mmcv's setup.py import.
BUILD_TOOLS = ('setuptools==80.10.2', 'wheel==0.45.1', 'ninja==1.13.0')
# Installed without their dependencies, the rest of which is in requirements/stack.txt: they ask for
# opencv-python, which needs libGL (there is the headless one), and openmim for an old setuptools.
OPENMMLAB = ('mmengine==0.10.7', 'mmdet==3.3.0', 'mmyolo==0.6.0', 'openmim==0.3.9')
# The maintained fork of MMEngine is the same module, so it has a folder of its own:
# tests/test_fork.py puts that on the path.
FORK = 'onedl-mmengine==0.10.12'

# -O1: on a CPU the detectors spend their time in torch, not in these ops, and -g alone would take
# half of the compile time. CFLAGS replaces Python's own flags, hence NDEBUG and fwrapv.
CFLAGS = ['-DNDEBUG', '-fwrapv', '-g0', '-O1', '-w']
# A precompiled header is taken only where it was built with the very flags of the files that use
# it; these are the ones torch's BuildExtension adds to CFLAGS.
EXTENSION_FLAGS = [
    '-fPIC',
    '-std=c++20',
    '-DTORCH_API_INCLUDE_EXTENSION_H',
    '-DTORCH_EXTENSION_NAME=_ext',
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('venv', type=Path, help='folder of the virtual environment')
    venv = parser.parse_args().venv.resolve()
    check_python()
    check_compiler()
    python = venv / 'bin' / 'python'
    steps = Steps(venv)

    with steps.step('virtual environment', 'seconds', sys.version) as todo:
        if todo:
            run([sys.executable, '-m', 'venv', '--clear', venv])
    with steps.step('build tools', 'seconds', *BUILD_TOOLS) as todo:
        if todo:
            pip_install(python, todo, *BUILD_TOOLS)
    with steps.step(TORCH, 'half a minute with a local wheel, else a download', TORCH) as todo:
        if todo:
            pip_install(python, todo, TORCH, *BUILD_TOOLS)
    files = [ROOT / 'requirements' / name for name in ('stack.txt', 'docs.txt')]
    requirements = ''.join(file.read_text() for file in files)
    with steps.step('requirements of the stack', '1 to 2 minutes', requirements) as todo:
        if todo:
            pip_install(python, todo, *(part for file in files for part in ('-r', file)))
    with steps.step(
        f'{MMCV} with compiled ops', '5 minutes on 2 cores, seconds if cached', TORCH, MMCV
    ) as todo:
        if todo:
            pip_install(python, todo, '--no-deps', mmcv_wheel(python))
    with steps.step(' '.join(OPENMMLAB), 'seconds', *OPENMMLAB) as todo:
        if todo:
            pip_install(python, todo, '--no-deps', *OPENMMLAB)
    with steps.step(f'{FORK} in a folder of its own', 'seconds', FORK) as todo:
        if todo:
            folder = venv / 'onedl-mmengine'
            shutil.rmtree(folder, ignore_errors=True)
            pip_install(python, todo, '--no-deps', '--target', folder, FORK)
    pyproject = (ROOT / 'pyproject.toml').read_text()
    with steps.step('mmema, editable', 'seconds', str(ROOT), pyproject) as todo:
        if todo:
            pip_install(python, todo, '--no-deps', '--no-build-isolation', '-e', ROOT)


def check_python():
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        sys.exit(
            f'bootstrap: the pinned stack needs Python 3.11 or 3.12 (tested: 3.11), this is '
            f'{platform.python_version()}. Name another one: make setup PYTHON=python3.11'
        )


def check_compiler():
    """Look for what mmcv is built with, before the long downloads."""
    if list(mmcv_cache().glob('*.whl')):
        return
    if not shutil.which(compiler()):
        sys.exit(
            f'bootstrap: no C++ compiler {compiler()}, which {MMCV} is built with: install one '
            '(Debian, Ubuntu: apt-get install g++), or name yours: CXX=clang++ make setup'
        )
    header = Path(sysconfig.get_paths()['include']) / 'Python.h'
    if not header.exists():
        sys.exit(
            f'bootstrap: no {header}, which {MMCV} is built with: install the headers of this '
            'Python (Debian, Ubuntu: apt-get install python3-dev)'
        )


def compiler():
    return os.environ.get('CXX', 'g++').split()[0]


class Steps:
    """Remembers in the virtual environment which steps are done, and for which inputs."""

    def __init__(self, venv):
        self.folder = venv / '.mmema-setup'
        self.count = 0

    @contextmanager
    def step(self, name, duration, *inputs):
        """Yield what is to do: '' (nothing), 'first' or 'again' (an earlier try was cut off)."""
        self.count += 1
        key = hashlib.sha256('\n'.join(inputs).encode()).hexdigest()
        done = self.folder / f'{self.count}.done'
        started = self.folder / f'{self.count}.started'
        if done.exists() and done.read_text() == key:
            yield ''
            return
        say(f'{self.count}/8 {name} ({duration}) ...')
        begin = time.monotonic()
        todo = 'again' if started.exists() or done.exists() else 'first'
        if self.count > 1:  # step 1 makes the folder that holds the marks
            started.touch()
            done.unlink(missing_ok=True)
        yield todo
        self.folder.mkdir(exist_ok=True)
        done.write_text(key)
        started.unlink(missing_ok=True)
        say(f'{self.count}/8 {name}: done in {time.monotonic() - begin:.0f} s')


def pip_install(python, todo, *what):
    # A pip that was killed can leave half a package which the next pip takes for whole, and which
    # it could not uninstall; so write over whatever is there.
    over = ['--ignore-installed'] if todo == 'again' else []
    pip(python, 'install', '-qq', '--no-warn-conflicts', *over, *what)


def mmcv_wheel(python, torch=TORCH):
    """Return the wheel of mmcv with its ops for this torch, from the user's cache or built into it.

    ``torch`` is installed beside ``python``.
    """
    folder = mmcv_cache(torch)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / 'lock').open('w') as lock:  # two checkouts set up at once: one of them builds
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say('    another set-up builds the same wheel; waiting for it')
            fcntl.flock(lock, fcntl.LOCK_EX)
        wheels = list(folder.glob('*.whl'))
        return wheels[0] if wheels else build_mmcv(python, folder)


def mmcv_cache(torch=TORCH):
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmema'
    key = f'{MMCV}-{torch}-cp{sys.version_info[0]}{sys.version_info[1]}-{platform.machine()}'
    return cache / key.replace('==', '-')


def build_mmcv(python, folder):
    # The object files stay until the wheel is whole: an interrupted build goes on, not over.
    build = folder / 'build'
    source = build / MMCV.replace('==', '-')
    if not (source / 'setup.py').exists():
        shutil.rmtree(build, ignore_errors=True)
        unpack_mmcv(python, build)
    flags = CFLAGS + precompiled_header(python, build)
    env = dict(
        os.environ,
        CFLAGS=' '.join(flags),
        MMCV_WITH_OPS='1',
        MAX_JOBS=str(os.cpu_count()),
        CUDA_VISIBLE_DEVICES='',  # CPU ops, also where a GPU is in the machine
        PATH=f'{python.parent}{os.pathsep}{os.environ["PATH"]}',
    )
    out = build / 'wheel'
    log = build / 'build.log'
    say(f'    compiling 77 files; its log: {log}')
    run_with_progress(
        [python, '-m', 'pip', 'wheel', '-v', '--no-build-isolation', '--no-deps']
        + ['-w', out, source],
        env,
        log,
    )
    built = next(out.glob('*.whl'))
    wheel = folder / built.name
    os.replace(built, wheel)
    shutil.rmtree(build)
    return wheel


def unpack_mmcv(python, build):
    fresh = build.with_suffix('.new')
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    pip(
        python,
        *['download', '-qq', '--no-deps', '--no-build-isolation', '--no-binary', 'mmcv'],
        *['-d', fresh, MMCV],
    )
    with tarfile.open(next(fresh.glob('*.tar.gz'))) as archive:
        archive.extractall(fresh)
    setup = fresh / MMCV.replace('==', '-') / 'setup.py'
    # torch 2.13's headers are C++20, and torch keeps a -std= that it is given.
    setup.write_text(setup.read_text().replace('-std=c++14', '-std=c++20'))
    os.replace(fresh, build)


def precompiled_header(python, build):
    """Compile torch's headers once instead of 77 times; return the flags that use the result."""
    header = build / 'mmema_pch.h'
    compiled = build / 'mmema_pch.h.gch'
    use = ['-include', str(header)]
    if compiled.exists():
        return use
    say('    precompiling the headers of torch (half a minute)')
    paths = output(
        [python, '-c', 'from torch.utils.cpp_extension import include_paths as p; print(*p())']
    ).split()
    include = [f'-I{path}' for path in [*paths, sysconfig.get_paths()['include']]]
    header.write_text('#include <torch/types.h>\n')
    part = build / 'mmema_pch.part'
    command = [compiler(), *CFLAGS, *EXTENSION_FLAGS, *include, '-x', 'c++-header', header]
    try:
        run([*command, '-o', part])
    except (SystemExit, OSError):
        say('    the compiler makes no precompiled header; going on without, about 15 minutes')
        header.unlink()
        return []
    os.replace(part, compiled)
    return use


def run_with_progress(command, env, log):
    begin = time.monotonic()
    done = 0
    with log.open('w') as file:
        process = subprocess.Popen(
            list(map(str, command)),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors='replace',
        )
        for line in process.stdout:
            file.write(line)
            place = line.strip().split(' ', 1)[0]
            if place.startswith('[') and place.endswith(']') and '/' in place:
                done += 1
                if done % 10 == 0:
                    say(f'    {place[1:-1]} files, {time.monotonic() - begin:.0f} s')
    if process.wait():
        tail = '\n'.join(log.read_text(errors='replace').splitlines()[-15:])
        sys.exit(f'bootstrap: building {MMCV} failed; the whole log is {log}, its end:\n{tail}')


def pip(python, *arguments):
    run([python, '-m', 'pip', '--disable-pip-version-check', *arguments])


def run(command):
    command = list(map(str, command))
    status = subprocess.call(command)
    if status:
        sys.exit(f'bootstrap: this command ended with status {status}: {" ".join(command)}')


def output(command):
    return subprocess.check_output(list(map(str, command)), text=True)


def say(text):
    print(text, flush=True)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('bootstrap: interrupted; the same command goes on where it stopped')
