"""Mean intersection over union of a whole data set, and of each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor

from stseg.checks import check_count
from stseg.data.items import duplicate
from stseg.distributed import all_gather, all_reduce_sum
from stseg.functional import confusion_matrix, dice, iou, pixel_accuracy
from stseg.functional.classes import check_classes
from stseg.functional.confusion import compute_confusion_matrix


class MeanIoU:
    """Mean IoU from one confusion matrix over all updates.

    Classes that are neither true nor predicted anywhere are left out of the mean. This is the evaluation of
    the paper (Yang et al., CVPR 2022): not a mean over images.

    With ``per_image=True`` the IoU of each image is kept as well. The mIoU of an image is the mean over the classes
    that are true or predicted in it; that of an image without a pixel that counts is NaN. An image with few classes or
    small objects weighs there as much as any other, so the mean over images differs from the one above.

    Args:
        num_classes: number of classes K.
        ignore_index: mask value of ignored pixels.
        per_image: whether to keep the IoU of each image, K float64 each.

    Example:
        >>> metric = MeanIoU(2)
        >>> metric.update(torch.tensor([[0, 1, 1, 1]]), torch.tensor([[0, 1, 0, 255]]))
        >>> metric.compute()
        0.5
        >>> metric = MeanIoU(2, per_image=True)
        >>> prediction, target = torch.tensor([[[0, 1]], [[0, 0]]]), torch.tensor([[[0, 1]], [[0, 1]]])
        >>> metric.update(prediction, target, ids=["first", "second"])
        >>> metric.miou_per_image()
        {'first': 1.0, 'second': 0.25}
        >>> metric.mean_over_images()
        0.625
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, *, per_image: bool = False) -> None:
        check_classes(num_classes, ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.per_image = per_image
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        """``(K, K)`` int64 on the CPU: rows are the true class, columns the predicted one."""
        self._images: dict[str | int, Tensor] = {}  # IoU of each class, by id or number

    def update(self, prediction: Tensor, target: Tensor, *, ids: Sequence[str] | None = None) -> None:
        """Add predictions.

        Args:
            prediction: integer class maps of any shape; with ``per_image``, ``(H, W)`` or ``(B, H, W)``.
            target: true class maps of the same shape.
            ids: with ``per_image``, an id for each of the B images; None numbers them.

        Raises:
            ValueError: if shapes differ, a value is neither a class nor the ignore index, or an id occurs twice.
            TypeError: if the dtype is not integral.
        """
        if not self.per_image:
            if ids is not None:
                raise ValueError("ids name single images; expected MeanIoU(..., per_image=True)")
            self.matrix += confusion_matrix(prediction, target, self.num_classes, ignore_index=self.ignore_index).cpu()
            return
        if prediction.ndim not in (2, 3):
            raise ValueError(f"prediction has shape {tuple(prediction.shape)}; expected (H, W) or (B, H, W)")
        confusion_matrix(prediction, target, self.num_classes, ignore_index=self.ignore_index)  # checks all of them
        height, width = prediction.shape[-2:]
        maps = prediction.reshape(-1, height, width), target.reshape(-1, height, width)
        self._check_ids(ids, len(maps[0]))
        for place, (image, true) in enumerate(zip(*maps, strict=True)):
            self.add(image, true, None if ids is None else ids[place])

    def add(self, prediction: Tensor, target: Tensor, id: str | None = None) -> None:
        """Add the prediction of a network for an image and its valid mask, without checks."""
        matrix = compute_confusion_matrix(prediction, target, self.num_classes, self.ignore_index).cpu()
        self.matrix += matrix
        if self.per_image:
            self._images[len(self._images) if id is None else id] = iou(matrix)

    def iou(self) -> Tensor:
        """Return the IoU of each class: ``(K,)`` float64, NaN for classes neither true nor predicted."""
        return iou(self.matrix)

    def dice(self) -> Tensor:
        """Return the Dice coefficient of each class: ``(K,)`` float64, NaN for classes neither true nor predicted."""
        return dice(self.matrix)

    def accuracy(self) -> float:
        """Return the pixel accuracy in [0, 1]: the share of the pixels whose class is right; NaN if none counts."""
        return float(pixel_accuracy(self.matrix))

    def compute(self) -> float:
        """Return the mean IoU in [0, 1]; NaN before the first update."""
        return float(self.iou().nanmean())

    def iou_per_image(self) -> dict[str, Tensor]:
        """Return the IoU of each class in each image: ``(K,)`` float64 by id, in the order of the updates.

        Raises:
            ValueError: if the metric was made without ``per_image=True``.
        """
        if not self.per_image:
            raise ValueError(
                "the metric holds no single images; expected MeanIoU(..., per_image=True), or "
                "stseg.evaluate(..., per_image=True)"
            )
        return {str(id): values for id, values in self._images.items()}

    def miou_per_image(self) -> dict[str, float]:
        """Return the mIoU of each image by id, in the order of the updates; NaN if no pixel of it counts.

        Raises:
            ValueError: if the metric was made without ``per_image=True``.
        """
        return {id: float(values.nanmean()) for id, values in self.iou_per_image().items()}

    def mean_over_images(self) -> float:
        """Return the mean of the mIoU of the images, without those that are NaN; NaN if there are none.

        Raises:
            ValueError: if the metric was made without ``per_image=True``.
        """
        known = [miou for miou in self.miou_per_image().values() if not math.isnan(miou)]
        return math.fsum(known) / len(known) if known else math.nan

    def worst_images(self, count: int = 10) -> list[tuple[str, float]]:
        """Return id and mIoU of the images with the lowest mIoU, lowest first, without those that are NaN.

        Args:
            count: how many at most.

        Raises:
            ValueError: if the metric was made without ``per_image=True``.
        """
        check_count("count", count)
        known = [(id, miou) for id, miou in self.miou_per_image().items() if not math.isnan(miou)]
        return sorted(known, key=lambda image: image[1])[:count]

    def reset(self) -> None:
        """Reset the counts to zero, and forget the images."""
        self.matrix.zero_()
        self._images.clear()

    def merge_processes(self) -> None:
        """Sum the counts over all processes of ``torch.distributed``, and collect the images.

        The images are taken from the processes in turn: so :func:`stseg.evaluate` and
        ``torch.utils.data.DistributedSampler(shuffle=False)`` deal them out.

        Raises:
            ValueError: if an id occurs in two processes.
        """
        self.matrix = all_reduce_sum(self.matrix)
        if self.per_image:
            turns = chain.from_iterable(zip_longest(*(part.items() for part in all_gather(self._images))))
            images = [image for image in turns if image is not None]
            if (twice := duplicate([id for id, _ in images if isinstance(id, str)])) is not None:
                raise ValueError(f"the image {twice!r} was added in more than one process; expected each in one")
            self._images = {place if isinstance(id, int) else id: iou for place, (id, iou) in enumerate(images)}

    def _check_ids(self, ids: Sequence[str] | None, count: int) -> None:
        """Raise a ``ValueError`` unless there is a new id for each image, or none for all images of all updates."""
        if self._images and isinstance(next(iter(self._images)), int) != (ids is None):
            raise ValueError("some images have ids and others none; expected ids= in each update, or in none")
        if ids is None:
            return
        if isinstance(ids, str) or len(ids) != count or not all(isinstance(id, str) for id in ids):
            raise ValueError(f"ids are {ids!r} for {count} images; expected a list of a string for each")
        twice = next((id for id in ids if id in self._images), duplicate(ids))
        if twice is not None:
            raise ValueError(f"the image {twice!r} was added twice; expected each once")

    def __repr__(self) -> str:
        return f"MeanIoU(num_classes={self.num_classes}, pixels={int(self.matrix.sum())}, mIoU={self.compute():.3f})"
