"""What importing the package brings in."""

import subprocess
import sys


def test_importing_mmema_brings_in_no_converter():
    code = "import mmema, sys; print(*(n for n in sys.modules if n.startswith('mmema.checkp')))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {
        'mmema.checkpoints',
        'mmema.checkpoints.folders',
        'mmema.checkpoints.probe',
        'mmema.checkpoints.resume',
        'mmema.checkpoints.torch_load',
    }
