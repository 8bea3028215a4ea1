"""The picture of the rooms in docs/design.md is that of the imports."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 'mmema'
PAGE = (ROOT / 'docs' / 'design.md').read_text()
NOT_DRAWN = {'__init__', '__main__', 'registry', 'arguments', 'messages'}


def drawn():
    """Return the (room, room below) pairs of the picture."""
    picture = re.search(r'```mermaid\n(.*?)```', PAGE, re.S).group(1)
    edges = set()
    for line in picture.splitlines()[1:]:
        above, below = line.split('-->')
        edges |= {(above.strip(), room.strip()) for room in below.split('&')}
    return edges


def imported():
    """Return the (room, room that it imports) pairs of the package."""
    edges = set()
    for file in PACKAGE.rglob('*.py'):
        path = file.relative_to(PACKAGE).with_suffix('').parts
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = path[: len(path) - node.level]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            edges |= {(path[0], (*base, *name.split('.'))[0]) for name in names}
    return {(a, b) for a, b in edges if a != b and not {a, b} & NOT_DRAWN}


def test_the_picture_is_that_of_the_imports():
    assert drawn() == imported()


def test_arrows_only_point_down():
    # In the order of the picture's lines, from the top.
    order = list(dict.fromkeys(re.findall(r'(\w+) -->', PAGE)))
    below = {room: number for number, room in enumerate(order)}
    for above, room in drawn():
        assert below[above] < below.get(room, len(order)), f'{above} --> {room}'


def test_nothing_below_uses_the_rooms_for_everyone_upwards():
    for file in NOT_DRAWN - {'__init__', '__main__'}:
        tree = ast.parse((PACKAGE / f'{file}.py').read_text())
        relative = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
        assert not relative, file


def test_no_room_but_the_commands_imports_a_library_of_detectors():
    for file in PACKAGE.rglob('*.py'):
        if file.parent.name == 'cli':
            continue  # inside of functions, where a config names the library
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            assert not {name.split('.')[0] for name in names} & {'mmcv', 'mmdet', 'mmyolo'}, file


def test_every_room_is_in_the_table():
    modules = {file.stem for file in PACKAGE.glob('[!_]*.py')}
    rooms = modules | {f'{folder.name}/' for folder in PACKAGE.glob('[!_]*/')}
    for room in rooms:
        name = f'`{room}`' if room.endswith('/') else f'`{room}.py`'
        assert name in PAGE, name


def test_a_command_imports_a_library_of_detectors_only_where_it_is_needed():
    for file in (PACKAGE / 'cli').glob('*.py'):
        for node in ast.parse(file.read_text()).body:
            names = [
                getattr(node, 'module', None) or '',
                *(a.name for a in getattr(node, 'names', [])),
            ]
            assert not {name.split('.')[0] for name in names} & {'mmcv', 'mmdet', 'mmyolo'}, file
