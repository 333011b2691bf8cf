"""Boundary IoU of a whole data set."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stseg.checks import check_positive
from stseg.distributed import all_reduce_sum
from stseg.functional import iou
from stseg.functional._checks import check_range, check_same_shape, indices
from stseg.functional.boundaries import find_boundary_region
from stseg.functional.classes import check_classes
from stseg.functional.confusion import compute_confusion_matrix


class BoundaryIoU:
    """Mean IoU of the pixels near contours (Boundary IoU, Cheng et al., CVPR 2021).

    Of the true and of the predicted mask of each class only the pixels within a distance of that mask's own contour
    count: ``round(dilation * diagonal of the image)`` pixels, at least 1; see
    :func:`stseg.functional.boundary_region`. They are counted over all updates, as in :class:`stseg.MeanIoU`, and not
    averaged over images.

    Ignored pixels do not count, and what is predicted there makes no difference: the prediction is taken to be ignored
    there as well. The edge of an ignored region is thus a contour of both.

    Args:
        num_classes: number of classes K.
        ignore_index: mask value of ignored pixels.
        dilation: distance as a share of the diagonal of each image. The paper uses 0.02, and 0.005 for the large
            images of Cityscapes.

    Example:
        >>> target = torch.zeros(60, 60, dtype=torch.int64)
        >>> target[20:40, 20:40] = 1
        >>> metric = BoundaryIoU(2)
        >>> metric.update(target.roll(1, 0), target)
        >>> metric.iou()
        tensor([0.8713, 0.6000], dtype=torch.float64)
        >>> round(metric.compute(), 3)
        0.736
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, dilation: float = 0.02) -> None:
        check_classes(num_classes, ignore_index)
        check_positive("dilation", dilation)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.dilation = dilation
        self.matrix = torch.zeros(num_classes + 1, num_classes + 1, dtype=torch.int64)
        """``(K + 1, K + 1)`` int64 on the CPU: confusion matrix of the pixels near contours; in the last row and column
        those that are not near a true contour, or not near a predicted one."""

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add predictions.

        Args:
            prediction: ``(H, W)`` or ``(B, H, W)`` integer class maps.
            target: true class maps of the same shape.

        Raises:
            ValueError: if shapes differ, or a value is neither a class nor the ignore index.
            TypeError: if the dtype is not integral.
        """
        check_same_shape("prediction", prediction, "target", target)
        if prediction.ndim not in (2, 3):
            raise ValueError(f"prediction has shape {tuple(prediction.shape)}; expected (H, W) or (B, H, W)")
        prediction, target = indices("prediction", prediction), indices("target", target)
        ignored = target == self.ignore_index
        check_range("prediction", prediction[~ignored], self.num_classes)
        check_range("target", target[~ignored], self.num_classes)
        distance = max(1, round(self.dilation * math.hypot(*target.shape[-2:])))

        small = torch.int16 if self.num_classes < 2**15 else torch.int64  # several times as fast

        def near(maps: Tensor) -> Tensor:
            maps = maps.masked_fill(ignored, self.num_classes).to(small)
            return maps.masked_fill(~find_boundary_region(maps, distance), self.num_classes)

        self.matrix += compute_confusion_matrix(near(prediction), near(target), self.num_classes + 1, None).cpu()

    def iou(self) -> Tensor:
        """Return the Boundary IoU of each class: ``(K,)`` float64, NaN for classes neither true nor predicted."""
        return iou(self.matrix)[: self.num_classes]

    def compute(self) -> float:
        """Return the mean over the classes in [0, 1]; NaN before the first update."""
        return float(self.iou().nanmean())

    def reset(self) -> None:
        """Reset the counts to zero."""
        self.matrix.zero_()

    def merge_processes(self) -> None:
        """Sum the counts over all processes of ``torch.distributed``."""
        self.matrix = all_reduce_sum(self.matrix)

    def __repr__(self) -> str:
        return f"BoundaryIoU(num_classes={self.num_classes}, dilation={self.dilation}, mIoU={self.compute():.3f})"
