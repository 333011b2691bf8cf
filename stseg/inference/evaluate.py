"""Evaluation of a network on a labeled data set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stseg.data.convert import check_mask_values
from stseg.data.items import ids_of
from stseg.errors import DataError
from stseg.functional._checks import check_classes
from stseg.inference.mean_iou import MeanIoU
from stseg.inference.sweep import batch_by_size, check_finite, load, local_share, predictor, progress_bar
from stseg.models.segmenter import as_segmenter
from stseg.models.state import device_of, evaluating
from stseg.types import Precision


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    num_classes: int,
    ignore_index: int = 255,
    batch_size: int = 8,
    num_workers: int = 0,
    precision: Precision = "fp32",
    progress: bool = True,
) -> MeanIoU:
    """Compare a model with the true masks, each image at its full size, at one scale.

    The evaluation of the paper (Yang et al., CVPR 2022): one confusion matrix over the whole set.

    Args:
        model: a network or a wrapped one; its mode is what it was afterwards.
        dataset: items ``(image, mask)``.
        num_classes: number of classes.
        ignore_index: value of mask pixels that do not count.
        batch_size: how many images of equal size at once; does not change the result.
        num_workers: processes that read the data.
        precision: ``"fp32"`` or ``"bf16"``.
        progress: whether to show a bar.

    Returns:
        The metric: ``.compute()`` is the mIoU, ``.iou()`` that of each class. Under ``torch.distributed``
        the processes share the work and each gets the whole result.

    Raises:
        DataError: if there is no item, or a mask is missing, of another size than its image, or holds a value that
            is no class.
        NetworkError: if the network has another number of classes, or returns NaN or infinite logits.

    Example:
        >>> data = [(torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8))] * 3
        >>> 0 <= evaluate(nn.Conv2d(3, 2, 1), data, num_classes=2, progress=False).compute() <= 1
        True
    """
    check_classes(num_classes, ignore_index)
    model = as_segmenter(model)
    predict = predictor(model, num_classes, precision)
    ids = ids_of(dataset)
    if not ids:
        raise DataError("the data set to evaluate on is empty")
    metric = MeanIoU(num_classes, ignore_index)
    mine = local_share(len(ids))
    truth: dict[int, Tensor] = {}

    def images() -> Iterator[tuple[int, Tensor]]:
        for index, (image, mask) in load(dataset, mine, batch_size=batch_size, num_workers=num_workers, with_mask=True):
            check_mask_values(mask, num_classes, ignore_index, name=ids[index])
            truth[index] = mask
            yield index, image

    def classes(batch: Tensor) -> list[tuple[Tensor, bool]]:
        logits = predict(batch)
        return list(zip(logits.argmax(1).cpu(), logits.isfinite().flatten(1).all(1).tolist(), strict=True))

    with evaluating(model), torch.no_grad():
        results = batch_by_size(classes, images(), batch_size=batch_size, device=device_of(model))
        for index, (prediction, finite) in progress_bar(results, total=len(mine), title="evaluate", show=progress):
            check_finite(finite, name=f"image {ids[index]!r}")
            metric.update(prediction, truth.pop(index))
    metric.merge_processes()
    return metric
