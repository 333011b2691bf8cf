"""Evaluation of a network on a labeled data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from stseg.data.convert import check_mask_values
from stseg.data.items import Items
from stseg.functional.classes import check_classes
from stseg.inference.class_counts import ClassCounts
from stseg.inference.extra_metrics import ExtraMetrics, check_metrics, is_metric
from stseg.inference.mean_iou import MeanIoU
from stseg.inference.sweep import Sweep, check_batch_size, finite_images, predictor
from stseg.models.segmenter import as_segmenter
from stseg.models.state import move
from stseg.types import Metric, Precision


def evaluate(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    num_classes: int,
    ignore_index: int = 255,
    batch_size: int = 8,
    num_workers: int = 0,
    precision: Precision = "auto",
    device: torch.device | str | None = None,
    per_image: bool = False,
    metrics: Mapping[str, Metric] | None = None,
    progress: bool = True,
) -> MeanIoU:
    """Evaluate a model against the true masks, on whole images at one scale.

    The evaluation of the paper (Yang et al., CVPR 2022): one confusion matrix over the whole set.

    Args:
        model: a network or a wrapped one; its training mode is restored.
        dataset: items ``(image, mask)``.
        num_classes: number of classes.
        ignore_index: mask value of ignored pixels.
        batch_size: most images of a batch; does not change the result.
        num_workers: processes that read the data.
        precision: ``"fp32"``, ``"bf16"``, or ``"auto"`` for bfloat16 where the device computes it natively.
        device: device to move the model to; None leaves it where it is.
        per_image: whether the result tells of each image, too: ``.miou_per_image()`` by id, in the order of the data
            set, ``.mean_over_images()``, ``.worst_images()``.
        metrics: more metrics by name, such as :class:`stseg.BoundaryIoU` or those of torchmetrics; see
            :class:`stseg.types.Metric` for what they are updated with. They are reset first, if they have ``reset``,
            and hold their values afterwards: ``metrics["name"].compute()``, in each process.
        progress: whether to show a bar.

    Returns:
        The metric: ``.compute()`` returns the mIoU, ``.iou()`` the IoU of each class. Under ``torch.distributed``
        the processes share the work and each gets the complete result.

    Raises:
        DataError: if the data set is empty, or a mask is missing, differs from its image in size, or has a value that
            is not a class; or if all masks hold 0 and the ignore index 255 alone.
        NetworkError: if the network has a different number of classes, or returns NaN or infinite logits.
        MetricError: if one of ``metrics`` fails; names it.
        TypeError: if one of them has no ``update`` or ``compute``.

    Example:
        >>> data = [(torch.zeros(3, 8, 8), torch.zeros(8, 8, dtype=torch.uint8))] * 3
        >>> 0 <= evaluate(nn.Conv2d(3, 2, 1), data, num_classes=2, progress=False).compute() <= 1
        True
    """
    check_classes(num_classes, ignore_index)
    check_batch_size(batch_size)
    check_metrics(metrics)
    if makers := [name for name, metric in (metrics or {}).items() if not is_metric(metric)]:
        raise TypeError(f"metric {makers[0]!r} is a function or a class; expected an object, which keeps the value")
    model = move(as_segmenter(model), device)
    predict = predictor(model, num_classes, precision)
    sweep = Sweep(Items.of(dataset), "evaluate", batch_size, num_workers, progress, with_mask=True)
    extra = ExtraMetrics(metrics)
    metric = MeanIoU(num_classes, ignore_index, per_image=per_image)
    counts = ClassCounts(num_classes, ignore_index, "evaluated")
    truth: dict[int, Tensor] = {}

    def keep(index: int, image: Tensor, mask: Tensor) -> None:
        check_mask_values(mask, num_classes, ignore_index, name=sweep.items.ids[index])
        counts.add(mask)
        truth[index] = mask

    def classes(batch: Tensor) -> tuple[Tensor, Tensor]:
        highest, mask = predict(batch).max(1)
        return mask, finite_images(highest)

    with sweep.predict([model], classes, on_item=keep) as predictions:
        for index, (prediction,) in predictions:
            mask = truth.pop(index)
            metric.add(prediction, mask, sweep.items.ids[index])
            extra.update(prediction, mask)
    metric.merge_processes()
    extra.merge_processes()
    counts.merge_processes()
    counts.refuse_none()
    counts.refuse_ignored_foreground()
    counts.warn_of_mixed_values()
    return metric
