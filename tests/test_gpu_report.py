"""benchmarks/gpu_report.py: without a GPU it goes the same way, and calls nothing measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_report
import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / 'benchmarks'


def run(*arguments, **environment):
    command = [sys.executable, FOLDER / 'gpu_report.py', *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_without_a_gpu_it_says_so(tmp_path):
    done = run('--out', tmp_path / 'gpu')
    assert done.returncode == 1 and done.stdout == ''
    assert done.stderr.startswith('make gpu needs a CUDA device, and torch ')
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / 'gpu').exists()


@pytest.mark.slow
def test_the_whole_way_on_a_cpu_without_any_detector_library(tmp_path):
    hidden = ('mmyolo', 'mmdet', 'mmcv')
    (tmp_path / 'sitecustomize.py').write_text(
        f'import sys\nsys.modules.update(dict.fromkeys({hidden}))\n'
    )
    out = tmp_path / 'gpu'
    done = run('--device', 'cpu', '--quick', '--out', out, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == str(out / 'report.md')
    assert {file.name for file in out.iterdir()} == {'report.md', 'report.json'}
    text, report = (out / 'report.md').read_text(), json.loads((out / 'report.json').read_text())
    assert 'stand-ins with the tensors of its models' in text
    assert '| mmengine | ' in text and '| mmyolo | ' not in text
    tests = report['tests']
    skipped = int(re.search(r'(\d+) skipped', tests['summary'])[1])
    assert tests['failed'] == [] and skipped > 60 * (not torch.cuda.is_available())
    assert all((figure, met) == ('not measured', None) for _, figure, met in report['aims'])


def test_an_aim_is_a_ratio_within_a_round():
    device = {'limit: one flat lerp_': [1e-4, 2e-4, 4e-4], 'mmema': [2e-4, 2e-4, 4.4e-4]}
    device.update(mmdet=[1e-3] * 3, mmyolo=[4e-4] * 3)
    host = {'mmema': [2e-4, 3e-4, 9e-4]}
    figures = {
        'device': 'cuda',
        'updates': {'YOLOv5-s': {'device': device, 'host': host}},
        'launches': {'YOLOv5-s': {'mmema': [6, 0]}, 'YOLOv5-n': {'mmema': [11, 0]}},
    }
    found = {aim: (figure, met) for aim, figure, met in gpu_report.aims(figures)}
    assert found['YOLOv5-s: at most 1.2 times the limit on the device'] == ('1.10 times', True)
    assert found["YOLOv5-s: at least 5 times as fast as mmdet's class"] == ('5.00 times', True)
    assert found["YOLOv5-s: at least 2.5 times as fast as mmyolo's class"] == ('2.00 times', False)
    assert found['YOLOv5-s: at most 0.3 ms on the host'] == ('0.30 ms', True)
    assert found['an update: at most 10 launches'] == ('at most 11', False)
    assert found['an update: no wait for the GPU'] == ('at most 0', True)
    assert found['YOLOv5-l: at most 1.2 times the limit on the device'] == ('not measured', None)
    # The same seconds on a CPU are no figures of a GPU.
    rows = gpu_report.aims({'device': 'cpu', 'updates': figures['updates']})
    assert {figure for _, figure, _ in rows} == {'not measured'}


def test_a_failed_test_is_named_in_the_report():
    report = {
        'tests': {'summary': '1 failed, 2 passed', 'failed': ['FAILED tests/test_x.py::test_y']},
        'aims': [['fast', '1.00 times', False]],
    }
    text = gpu_report.text_of(report, 'performance', 'cuda')
    assert '1 failed, 2 passed\n- FAILED tests/test_x.py::test_y\n' in text
    assert '| fast | 1.00 times | **no** |' in text
