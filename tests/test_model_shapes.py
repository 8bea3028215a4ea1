"""The tables of the repository are those of the real models, and so are the stand-ins."""

import model_shapes
import pytest


@pytest.mark.parametrize('name', model_shapes.CONFIGS)
def test_the_stand_in_has_the_modules_and_tensors_of_the_real_model(name):
    pytest.importorskip('mmyolo')
    real, stand_in = model_shapes.real_model(name), model_shapes.stand_in(name)
    assert model_shapes.table_of(stand_in) == model_shapes.table_of(real)
    assert [*stand_in.state_dict()] == [*real.state_dict()]
    assert [n for n, _ in stand_in.named_modules()] == [n for n, _ in real.named_modules()]


def test_the_file_is_what_the_tool_writes():
    stand_in = model_shapes.stand_in('YOLOv5-n')
    assert sum(p.numel() for p in stand_in.parameters()) == 1_872_157
    text = model_shapes.text_of(model_shapes.table_of(stand_in))
    assert text == model_shapes.file_of('YOLOv5-n').read_text()
