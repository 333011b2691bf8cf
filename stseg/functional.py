"""The mathematics: pure, batched functions on tensors of any device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stseg.samples import check_classes, index_dtype
from stseg.thresholds import check_threshold


class PseudoLabels(NamedTuple):
    """What a network believes of a batch of images."""

    mask: Tensor
    """``(B, H, W)`` class indices, uint8 (int32 where classes or ignore index do not fit)."""
    confidence: Tensor
    """``(B, H, W)`` float32, the probability of the most probable class."""


def confusion_matrix(
    prediction: Tensor, target: Tensor, num_classes: int, *, ignore_index: int | None = None
) -> Tensor:
    """Count how often each class was predicted where each class is true.

    Args:
        prediction: integer class maps of any shape; values in ``[0, num_classes)`` wherever the target counts.
        target: integer class maps of the same shape.
        num_classes: number of classes.
        ignore_index: target value of pixels that do not count.

    Returns:
        ``(num_classes, num_classes)`` int64: rows are the true class, columns the predicted one.

    Raises:
        ValueError: if shapes differ, or a value is no class or no integer.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    _check_same_shape("prediction", prediction, "target", target)
    prediction, target = _indices("prediction", prediction).flatten(), _indices("target", target).flatten()
    if ignore_index is not None:
        counted = target != ignore_index
        prediction, target = prediction[counted], target[counted]
    _check_range("prediction", prediction, num_classes)
    _check_range("target", target, num_classes)
    cells = torch.bincount(target * num_classes + prediction, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def iou(matrix: Tensor) -> Tensor:
    """Intersection over union of each class.

    Args:
        matrix: ``(..., K, K)`` confusion matrices.

    Returns:
        ``(..., K)`` float64; NaN for classes that are neither true nor predicted anywhere.

    Example:
        >>> iou(torch.tensor([[1, 1], [0, 1]]))
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """
    matrix = _countable(matrix).double()
    intersection = matrix.diagonal(dim1=-2, dim2=-1)
    return intersection / (matrix.sum(-1) + matrix.sum(-2) - intersection)


def mean_iou(prediction: Tensor, target: Tensor, num_classes: int, *, ignore_index: int | None = None) -> Tensor:
    """Mean, over the classes that are true or predicted somewhere, of intersection over union.

    Args:
        prediction: integer class maps of any shape.
        target: integer class maps of the same shape.
        num_classes: number of classes.
        ignore_index: target value of pixels that do not count.

    Returns:
        float64 scalar in [0, 1]; NaN if no pixel counts.

    Raises:
        ValueError: if shapes differ, or a value is no class or no integer.

    Example:
        >>> mean_iou(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 3)
        tensor(0.5000, dtype=torch.float64)
    """
    return iou(confusion_matrix(prediction, target, num_classes, ignore_index=ignore_index)).nanmean()


def stability(masks: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """Agreement of earlier predictions with the last one, image by image.

    The image-level reliability of ST++ (Yang et al., CVPR 2022, section 3.3): the mean, over the earlier
    checkpoints, of the per-image mean IoU between their mask and the reference mask. Classes that are in
    neither mask do not count.

    Args:
        masks: ``(K, B, H, W)`` integer class maps of K earlier checkpoints.
        reference: ``(B, H, W)`` class map of the last checkpoint.
        num_classes: number of classes; every value must lie in ``[0, num_classes)``.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``; 1 where all checkpoints agree everywhere.

    Raises:
        ValueError: if shapes do not match, ``masks`` holds no checkpoint, or a value is no class or no integer.

    Example:
        >>> stability(torch.zeros(2, 1, 4, 4, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long), 3)
        tensor([1.], dtype=torch.float64)
    """
    if masks.ndim != 4 or reference.ndim != 3 or masks.shape[1:] != reference.shape:
        raise ValueError(
            f"masks have shape {tuple(masks.shape)} and reference {tuple(reference.shape)}; "
            "expected (K, B, H, W) and (B, H, W)"
        )
    if masks.shape[0] == 0:
        raise ValueError("masks hold no checkpoint; expected one or more beside the reference")
    if reference[0:1].numel() == 0 and reference.shape[0]:
        raise ValueError(f"reference has shape {tuple(reference.shape)}: images without pixels")
    masks, reference = _indices("masks", masks), _indices("reference", reference)
    _check_range("masks", masks, num_classes)
    _check_range("reference", reference, num_classes)
    area = _class_areas(reference, num_classes)
    scores = []
    for mask in masks:
        # Where the two differ, the pixel goes to one class more, which is then left out.
        common = _class_areas(torch.where(mask == reference, mask, num_classes), num_classes + 1)[:, :-1]
        union = area + _class_areas(mask, num_classes) - common
        ratio = torch.where(union > 0, common.double() / union.clamp(min=1), 0.0)
        scores.append(ratio.sum(1) / (union > 0).sum(1))
    return torch.stack(scores).mean(0)


def pseudo_label(
    logits: Tensor, *, threshold: float | Sequence[float] | Tensor = 0.0, ignore_index: int = 255
) -> PseudoLabels:
    """The most probable class of each pixel, and how probable it is.

    Args:
        logits: ``(B, K, H, W)`` floats; log probabilities will do.
        threshold: pixels whose confidence is below it get ``ignore_index``; one value, or one for each of the K
            classes that a pixel may be given to. The paper (Yang et al., CVPR 2022) uses 0.
        ignore_index: value of pixels that are left out.

    Returns:
        mask ``(B, H, W)`` uint8 (int32 where classes or ignore index do not fit) and confidence ``(B, H, W)`` float32.

    Raises:
        ValueError: if logits are not 4-dimensional floats, a threshold is outside [0, 1], there are not K of them, or
            the ignore index is a class.

    Example:
        >>> mask, confidence = pseudo_label(torch.tensor([0.0, 2.0, 0.0]).reshape(1, 3, 1, 1), threshold=0.5)
        >>> int(mask), round(float(confidence), 3)
        (1, 0.787)
    """
    if logits.ndim != 4 or not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype} of shape {tuple(logits.shape)}; expected float (B, K, H, W)")
    num_classes = logits.shape[1]
    check_classes(num_classes, ignore_index)
    threshold = check_threshold(threshold, num_classes)
    # Not the arg max of the softmax, whose rounding makes equal what is not.
    mask, confidence = logits.argmax(1), logits.float().softmax(1).amax(1)
    if isinstance(threshold, tuple):
        least = torch.tensor(threshold, dtype=torch.float32, device=mask.device)
        mask = mask.masked_fill(confidence < least[mask], ignore_index)
    elif threshold > 0:
        mask = mask.masked_fill(confidence < threshold, ignore_index)
    return PseudoLabels(mask.to(index_dtype(num_classes, ignore_index)), confidence)


def _class_areas(mask: Tensor, num_classes: int) -> Tensor:
    """``(B, K)`` int64: pixels of each class in each image of ``(B, H, W)``."""
    offset = torch.arange(len(mask), device=mask.device)[:, None] * num_classes
    cells = torch.bincount((mask.flatten(1) + offset).flatten(), minlength=len(mask) * num_classes)
    return _countable(cells).reshape(len(mask), num_classes)


def _countable(counts: Tensor) -> Tensor:
    return counts.cpu() if counts.device.type == "mps" else counts  # Apple's GPUs have no float64


def _check_same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)} and {other_name} {tuple(other.shape)}; expected the same"
        )


def _indices(name: str, values: Tensor) -> Tensor:
    if values.is_floating_point() or values.is_complex():
        raise ValueError(f"{name} is {values.dtype}; expected integer class indices")
    return values.long()


def _check_range(name: str, values: Tensor, num_classes: int) -> None:
    if values.numel():
        low, high = (int(v) for v in torch.aminmax(values))
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} holds the value {wrong}; expected 0..{num_classes - 1}")
