"""The site of docs/ is built strictly: broken links, missing pages and unknown names are errors."""

import os
import re
import shutil
import subprocess
import sys

import forks
import pytest
from tool_runs import ROOT

import mmema

pytestmark = pytest.mark.slow
pytest.importorskip('mkdocs')


def build(folder, out):
    return subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir', out],
        cwd=folder,
        env=dict(os.environ, NO_MKDOCS_2_WARNING='1'),
        capture_output=True,
        text=True,
        timeout=forks.LIMIT,
    )


def test_it_is_built_and_has_every_public_name_once(tmp_path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    pages = [file.read_text() for file in (tmp_path / 'api').rglob('*.html')]
    for name in mmema.__all__:
        headings = [page.count(f'<h2 id="mmema.{name}"') for page in pages]
        assert sum(headings) == (name != '__version__'), name
    averages = (tmp_path / 'api' / 'averages' / 'index.html').read_text()
    for section in ('Parameters', 'Raises', 'Examples'):
        assert re.search(f'{section}:?</span>', averages), section


@pytest.mark.parametrize(
    ('text', 'reasons'),
    [
        (
            '[here](nowhere.md) and [here](#nowhere)',
            ["'nowhere.md', but the target is not found", 'there is no such anchor on this page'],
        ),
        ('::: mmema.NoSuchHook', ['mmema.NoSuchHook could not be found']),
    ],
)
def test_what_leads_nowhere_is_an_error(tmp_path, text, reasons):
    shutil.copytree(ROOT / 'mmema', tmp_path / 'mmema')
    (tmp_path / 'docs').mkdir()
    (tmp_path / 'docs' / 'index.md').write_text(text)
    settings = (ROOT / 'mkdocs.yml').read_text()
    (tmp_path / 'mkdocs.yml').write_text(re.sub(r'^nav:\n(^ .*\n)+', '', settings, flags=re.M))
    done = build(tmp_path, tmp_path / 'out')
    assert done.returncode
    for reason in reasons:
        assert reason in done.stderr
