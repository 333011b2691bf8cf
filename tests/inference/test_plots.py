from __future__ import annotations

import builtins

import pytest
import torch

from stseg import MeanIoU, draw_confusion_matrix

pytest.importorskip("matplotlib")

MATRIX = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
NAMES = ["road", "car", "$a^{$"]


def metric_of(matrix):
    metric = MeanIoU(len(matrix))
    metric.matrix = matrix
    return metric


def cells(figure):
    axes = figure.axes[0]
    texts = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    return [[texts[row, column] for column in range(3)] for row in range(3)]


@pytest.mark.parametrize(
    ("normalize", "expected"),
    [
        ("true", [["75.0", "25.0", "0.0"], ["25.0", "75.0", "0.0"], ["–"] * 3]),
        ("pred", [["85.7", "40.0", "–"], ["14.3", "60.0", "–"], ["0.0", "0.0", "–"]]),
        ("all", [["50.0", "16.7", "0.0"], ["8.3", "25.0", "0.0"], ["0.0"] * 3]),
        (None, [["6", "2", "0"], ["1", "3", "0"], ["0"] * 3]),
    ],
)
def test_draws_the_cells_under_their_names(tmp_path, normalize, expected):
    figure = draw_confusion_matrix(metric_of(MATRIX), NAMES, normalize=normalize)
    assert cells(figure) == expected
    axes, bar = figure.axes
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in ticks] == NAMES
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert ("pixels" if normalize is None else "%") in bar.get_ylabel()
    figure.savefig(tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 2000


def test_draws_a_matrix_and_numbers_the_classes():
    figure = draw_confusion_matrix(MATRIX)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]
    assert cells(figure) == cells(draw_confusion_matrix(metric_of(MATRIX)))


def test_writes_no_numbers_where_there_is_no_room(tmp_path):
    figure = draw_confusion_matrix(torch.eye(60))
    assert not figure.axes[0].texts
    figure.savefig(tmp_path / "many.png")


def test_changes_neither_the_matrix_nor_pyplot():
    import matplotlib.pyplot as plt

    metric, before = metric_of(MATRIX.clone()), plt.get_fignums()
    draw_confusion_matrix(metric, NAMES)
    assert torch.equal(metric.matrix, MATRIX)
    assert plt.get_fignums() == before


def test_refuses_what_cannot_be_drawn(monkeypatch):
    with pytest.raises(ValueError, match="holds no pixel"):
        draw_confusion_matrix(MeanIoU(3))
    with pytest.raises(ValueError, match="expected a name for each of the 3 classes"):
        draw_confusion_matrix(MATRIX, ["road", "car"])
    with pytest.raises(ValueError, match="expected a name for each of the 3 classes"):
        draw_confusion_matrix(MATRIX, "abc")
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \(K, K\)"):
        draw_confusion_matrix(MATRIX[:2])
    with pytest.raises(TypeError, match=r"metric is list; expected a stseg\.MeanIoU"):
        draw_confusion_matrix([[1]])
    with pytest.raises(ValueError, match="normalize is 'rows'; expected 'true', 'pred', 'all' or None"):
        draw_confusion_matrix(MATRIX, normalize="rows")
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: (_ for _ in ()).throw(ImportError()) if "matplotlib" in name else real(name, *a, **k),
    )
    with pytest.raises(ImportError, match=r"pip install 'stseg\[report\]'"):
        draw_confusion_matrix(MATRIX)
