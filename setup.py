"""The one step of a build that pyproject.toml cannot name; run by pip and ``python -m build``.

A wheel holds configs/ and tools/ as ``mmema/.mim/configs`` and ``mmema/.mim/tools``: there openmim
looks for those of every package. A checkout has them once.
"""

from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OF_THE_CHECKOUT = ('bootstrap.py', 'make_digits.py')  # its set-up, and data of its tests


class BuildWithTools(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        for folder in ('configs', 'tools'):
            target = Path(self.build_lib) / 'mmema' / '.mim' / folder
            rmtree(target, ignore_errors=True)  # of an earlier build
            ignore = ignore_patterns('__pycache__', *OF_THE_CHECKOUT)
            copytree(ROOT / folder, target, ignore=ignore)


setup(cmdclass={'build_py': BuildWithTools})
