"""Pictures of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stseg.checks import check_choice
from stseg.functional._checks import countable
from stseg.inference.mean_iou import MeanIoU

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WRITTEN = 24  # classes up to which the numbers are written into the cells


def draw_confusion_matrix(
    metric: MeanIoU | Tensor,
    class_names: Sequence[str] | None = None,
    *,
    normalize: Literal["true", "pred", "all"] | None = "true",
) -> Figure:
    """Draw a confusion matrix: a row for each true class, a column for each predicted one.

    Needs matplotlib (``pip install stseg[report]``). The figure belongs to no window: ``figure.savefig(path)`` writes
    it, and a notebook shows it.

    Args:
        metric: result of :func:`stseg.evaluate`, or a ``(K, K)`` confusion matrix.
        class_names: name of each class; None for numbers.
        normalize: what the cells are shares of, in percent: the pixels of the true class, a row (``"true"``), so that
            the diagonal is the recall; those of the predicted class, a column (``"pred"``), so that it is the
            precision; or all pixels (``"all"``). None draws numbers of pixels.

    Raises:
        ImportError: without matplotlib.
        ValueError: if no pixel is counted, or there is not a name for each class.
        TypeError: if it is neither a metric nor a matrix.

    Example:
        >>> metric = MeanIoU(2)
        >>> metric.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 0]]))
        >>> figure = draw_confusion_matrix(metric, ["road", "car"])
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['50.0', '50.0', '0.0', '100.0']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("draw_confusion_matrix needs matplotlib: pip install 'stseg[report]'") from error
    check_choice("normalize", normalize, "true", "pred", "all", None)
    matrix = _matrix_of(metric)
    names = [str(index) for index in range(len(matrix))] if class_names is None else list(class_names)
    if isinstance(class_names, str) or len(names) != len(matrix):
        raise ValueError(f"class_names are {class_names!r}; expected a name for each of the {len(matrix)} classes")
    shares = _normalized(matrix, normalize)
    figure = Figure(layout="constrained")
    side = 2.5 + 0.55 * min(len(names), _WRITTEN)
    figure.set_size_inches(side + 1, side)
    axes = figure.subplots()
    highest = 100.0 if normalize in ("true", "pred") else float(shares.max())
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=highest)
    units = {"true": "% of the true class", "pred": "% of the predicted class", "all": "% of all pixels"}
    figure.colorbar(picture, label="pixels" if normalize is None else units[normalize])
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_xticks(range(len(names)), names, rotation=0 if class_names is None else 90, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(names) <= _WRITTEN:
        _write_cells(axes, shares, halfway=highest / 2, decimals=0 if normalize is None else 1)
    return figure


def _matrix_of(metric: MeanIoU | Tensor) -> Tensor:
    matrix = metric.matrix if isinstance(metric, MeanIoU) else metric
    if not isinstance(matrix, Tensor):
        raise TypeError(f"metric is {type(metric).__name__}; expected a stseg.MeanIoU or a (K, K) confusion matrix")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"the confusion matrix has shape {tuple(matrix.shape)}; expected (K, K)")
    if not matrix.any():
        raise ValueError("the confusion matrix holds no pixel; expected metric.update(prediction, target) before")
    return countable(matrix.detach()).double().cpu()


def _normalized(matrix: Tensor, normalize: str | None) -> Tensor:
    """Return percentages; NaN where there is no pixel."""
    if normalize is None:
        return matrix
    dims = {"true": (1,), "pred": (0,), "all": (0, 1)}[normalize]
    return 100 * matrix / matrix.sum(dims, keepdim=True)


def _write_cells(axes: Any, shares: Tensor, *, halfway: float, decimals: int) -> None:
    for row, column in torch.cartesian_prod(*map(torch.arange, shares.shape)).tolist():
        value = float(shares[row, column])
        text = "–" if value != value else f"{value:,.{decimals}f}"
        color = "white" if value > halfway else "black"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
