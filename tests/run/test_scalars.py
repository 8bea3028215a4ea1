"""The scalars of a run, whatever became of its parts."""

import json

from mmema.run.scalars import read_scalars


def write(folder, name, points):
    path = folder / name / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(json.dumps(point) for point in points))
    return path


def test_parts_of_a_resumed_run(tmp_path):
    def point(step, value):
        return dict(loss=0.0, iter=step, step=step, ema_momentum=value)

    write(tmp_path, '20260101_000000', [point(1, 1), {'coco/mAP': 0.1, 'step': 1}, point(3, 2)])
    second = write(tmp_path, '20260102_000000', [point(2, 5), point(3, 6)])
    second.write_text(second.read_text() + '\n{"loss": 1.0, "st')
    scalars = read_scalars(tmp_path)
    assert [(p['step'], p['ema_momentum']) for p in scalars.train] == [(1, 1), (2, 5), (3, 6)]
    assert scalars.validations == [('20260101_000000', 1, {'coco/mAP': 0.1, 'step': 1})]
    assert scalars.notes == [f'line 3 of {second} is cut short and left out']
    assert scalars.names == ['coco/mAP', 'step']
    assert scalars.curve('coco/mAP') == [(1, 0.1)] and scalars.curve('gone') == []


def test_a_run_that_was_begun_anew_in_the_same_folder(tmp_path):
    def part(epochs, score):
        for epoch in range(1, epochs + 1):
            yield dict(loss=0.0, iter=4 * epoch, step=4 * epoch)
            yield {'coco/mAP': score, 'step': epoch}

    write(tmp_path, '20260101_000000', part(5, 0.1))
    write(tmp_path, '20260102_000000', part(2, 0.9))
    scalars = read_scalars(tmp_path)
    assert [p['step'] for p in scalars.train] == [4, 8]
    assert scalars.curve('coco/mAP') == [(1, 0.9), (2, 0.9)]
    assert [v.after for v in scalars.validations] == [4, 8]


def test_nothing_where_nothing_was_logged(tmp_path):
    assert read_scalars(tmp_path / 'nowhere') == ([], [], [])
