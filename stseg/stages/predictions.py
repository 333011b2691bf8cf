"""Predictions of the final network for the report of a run: chosen, drawn, and kept in its work directory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stseg.data.items import Items
from stseg.engine.config import TrainConfig
from stseg.inference.mean_iou import MeanIoU
from stseg.inference.sweep import Sweep, finite_images, predictor
from stseg.stages.galleries import draw_image, draw_mask
from stseg.stages.workdir import PREDICTIONS
from stseg.storage.records import read_record, write_record
from stseg.storage.seals import damaged

WORST, _BEST = 8, 4  # pictures
_MOST_COMPARED = 200  # images
_SIDE = 320  # longest side of a picture


@dataclass(frozen=True)
class PredictedImage:
    """Prediction for an image, drawn.

    Attributes:
        id: name of the image.
        size: its height and width.
        iou: mean IoU over the classes that are true or predicted in it; None without a true mask.
        image: data URI of the image.
        truth: data URI of its mask, ignored pixels transparent; empty without one.
        prediction: data URI of the predicted mask.
        values: values in both masks.
    """

    id: str
    size: tuple[int, int]
    iou: float | None
    image: str
    truth: str
    prediction: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class Predictions:
    """Predictions of the final network of a run for some images.

    Attributes:
        images: with true masks the worst ones first, then the best ones; without them in the order of the data set.
        compared: number of images that they were chosen from.
        total: number of images in the data set.
    """

    images: tuple[PredictedImage, ...]
    compared: int
    total: int


def predict_pictures(
    model: nn.Module,
    items: Items,
    num_classes: int,
    config: TrainConfig,
    *,
    with_mask: bool,
    progress: bool = True,
) -> Predictions:
    """Predict evenly spaced images, 200 with masks or 12 without, and draw the 8 worst and the 4 best ones, or all.

    Processes do not share the work.

    Args:
        model: the network, wrapped, on its device; its training mode is restored.
        items: ``(image, mask)`` or images.
        num_classes: number of classes.
        config: ignore index, batches and precision.
        with_mask: whether the items have masks; images without a pixel that counts are left out then.
        progress: whether to show a bar.

    Raises:
        DataError: if an item cannot be read, or there is none.
        NetworkError: if logits are not finite.
    """
    sweep = Sweep(items, "pictures", config.eval_batch_size, config.num_workers, progress, with_mask=with_mask)
    indices = range(0, len(items), -(-len(items) // (_MOST_COMPARED if with_mask else WORST + _BEST)))
    predict = predictor(model, num_classes, config.precision)
    read: dict[int, tuple[Tensor, ...]] = {}
    kept: list[tuple[float, int, Tensor, tuple[Tensor, ...]]] = []  # those to draw, of the ones so far

    def classes(batch: Tensor) -> tuple[Tensor, Tensor]:
        highest, mask = predict(batch).max(1)
        return mask, finite_images(highest)

    with sweep.predict(
        [model], classes, indices=indices, on_item=lambda index, *item: read.update({index: item})
    ) as predicted:
        for index, (prediction,) in predicted:
            item, iou = read.pop(index), math.inf
            if with_mask:
                metric = MeanIoU(num_classes, config.ignore_index)
                metric.add(prediction, item[1])
                iou = metric.compute()
            if not math.isnan(iou):
                kept.append((iou, index, prediction, item))
            kept.sort(key=lambda one: one[:2])
            del kept[WORST:-_BEST]
    images = (
        PredictedImage(
            items.ids[index],
            (int(prediction.shape[0]), int(prediction.shape[1])),
            iou if with_mask else None,
            draw_image(image, most=_SIDE),
            draw_mask(mask[0], config.ignore_index, most=_SIDE) if mask else "",
            draw_mask(prediction, None, most=_SIDE),
            tuple(sorted({value for each in (prediction, *mask) for value in torch.unique(each).tolist()})),
        )
        for iou, index, prediction, (image, *mask) in kept
    )
    return Predictions(tuple(images), len(indices), len(items))


def read_predictions(folder: Path, model: str | None = None) -> Predictions | None:
    """Read the predictions in a work directory.

    Args:
        folder: the work directory.
        model: fingerprint of the network that they are expected of; None for any.

    Returns:
        The predictions; None if there are none, or they are those of another network.

    Raises:
        DamagedFileError: if their file is damaged.
    """
    record = read_record(folder / PREDICTIONS, to="write it again")
    if record is None or (model is not None and record.get("model") != model):
        return None
    try:
        images = tuple(_image_of(**each) for each in record["images"])
        return Predictions(images, int(record["compared"]), int(record["total"]))
    except (KeyError, TypeError, ValueError):
        raise damaged(folder / PREDICTIONS, "is not a record of predictions", to="write it again") from None


def write_predictions(folder: Path, predictions: Predictions, model: str) -> None:
    """Keep the predictions of a network, with its fingerprint, in a work directory."""
    write_record(folder / PREDICTIONS, {"model": model, **asdict(predictions)})


def _image_of(size: Sequence[int], values: Sequence[int], **others: Any) -> PredictedImage:
    height, width = size
    return PredictedImage(size=(height, width), values=tuple(values), **others)
