"""The mathematics: pure, batched functions on tensors of any device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    scores = []
    for common, union in _overlaps(masks, reference, num_classes):
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


def weighted_stability(
    masks: Tensor, reference: Tensor, num_classes: int, *, power: float = 0.25, min_share: float = 0.0
) -> Tensor:
    """Stability in which large classes count for more and specks for nothing; not of the paper.

    A class of a few pixels weighs as much in the stability of the paper as one that fills the image. Here the IoU of
    each class weighs as the ``power`` of its area, the union of the two masks. With ``power=0`` and ``min_share=0`` it
    is :func:`stseg.functional.stability`. With ``power=1`` an earlier mask counts as ``a / (2 - a)``, where ``a`` is
    the share of its pixels that are equal: of one earlier mask, the order of :func:`stseg.functional.pixel_agreement`.

    Args:
        masks: ``(K, B, H, W)`` integer class maps of K earlier checkpoints.
        reference: ``(B, H, W)`` class map of the last checkpoint.
        num_classes: number of classes; every value must lie in ``[0, num_classes)``.
        power: how much area counts; 0 or more.
        min_share: classes whose area is a smaller share of the image than this are left out; in ``[0, 1]``. The
            largest class always counts.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``; 1 where all checkpoints agree everywhere (specks apart).

    Raises:
        ValueError: as :func:`stseg.functional.stability`, and if a keyword is out of its range.

    Example:
        >>> reference = torch.tensor([[[0, 0, 0, 1]]])
        >>> earlier = torch.tensor([[[[0, 0, 0, 2]]]])
        >>> stability(earlier, reference, 3)
        tensor([0.3333], dtype=torch.float64)
        >>> weighted_stability(earlier, reference, 3, power=1)
        tensor([0.6000], dtype=torch.float64)
    """
    _check_power(power)
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share is {min_share}; expected a share in [0, 1]")
    least = min_share * math.prod(reference.shape[1:]) - 1e-9  # 0.1 * 30 is 3.0000000000000004 in floating point
    scores = []
    for common, union in _overlaps(masks, reference, num_classes):
        largest = union.amax(1, keepdim=True).double()
        counts = (union > 0) & (union >= largest.clamp(max=least))
        scores.append(_mean_over_classes(common.double(), union, counts, power))
    return torch.stack(scores).mean(0)


def pixel_agreement(masks: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """Share of pixels on which earlier predictions agree with the last one, image by image; not of the paper.

    The mean over the earlier checkpoints. Unlike in :func:`stseg.functional.stability` a small class counts for as
    little as it covers.

    Args:
        masks: ``(K, B, H, W)`` integer class maps of K earlier checkpoints.
        reference: ``(B, H, W)`` class map of the last checkpoint.
        num_classes: number of classes; every value must lie in ``[0, num_classes)``.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``; 1 where all checkpoints agree everywhere.

    Raises:
        ValueError: as :func:`stseg.functional.stability`.

    Example:
        >>> reference = torch.tensor([[[0, 0, 0, 1]]])
        >>> pixel_agreement(torch.tensor([[[[0, 0, 0, 2]]]]), reference, 3)
        tensor([0.7500], dtype=torch.float64)
    """
    masks, reference = _checked_masks(masks, reference, num_classes)
    equal = _countable((masks == reference).flatten(2).sum(2))
    return (equal.double() / max(1, math.prod(reference.shape[1:]))).mean(0)


def mean_confidence(logits: Tensor) -> Tensor:
    """Mean over the pixels of an image of the probability of the most probable class; not of the paper.

    Args:
        logits: ``(B, K, H, W)`` floats; log probabilities will do.

    Returns:
        ``(B,)`` float64 scores in ``[1/K, 1]``; NaN for images with NaN logits.

    Raises:
        ValueError: if logits are not 4-dimensional floats of two or more classes and one or more pixels.

    Example:
        >>> mean_confidence(torch.zeros(1, 4, 2, 2))
        tensor([0.2500], dtype=torch.float64)
    """
    return _mean_over_pixels(_probabilities(logits).amax(1))


def mean_margin(logits: Tensor) -> Tensor:
    """Mean over the pixels of an image of how far the most probable class is ahead of the next; not of the paper.

    Args:
        logits: ``(B, K, H, W)`` floats; log probabilities will do.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``: differences of probabilities; NaN for images with NaN logits.

    Raises:
        ValueError: if logits are not 4-dimensional floats of two or more classes and one or more pixels.

    Example:
        >>> float(mean_margin(torch.tensor([0.5, 0.3, 0.2]).log().reshape(1, 3, 1, 1)).round(decimals=6))
        0.2
    """
    first, second = _probabilities(logits).topk(2, dim=1).values.unbind(1)
    return _mean_over_pixels(first - second)


def mean_certainty(logits: Tensor) -> Tensor:
    """Mean over the pixels of an image of 1 - H / log K, where H is the entropy of a pixel; not of the paper.

    Args:
        logits: ``(B, K, H, W)`` floats; log probabilities will do.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``: 1 where each pixel has one class for sure, 0 where all K classes are
        equally probable; NaN for images with NaN logits.

    Raises:
        ValueError: if logits are not 4-dimensional floats of two or more classes and one or more pixels.

    Example:
        >>> mean_certainty(torch.tensor([0.5, 0.5, 0.0, 0.0]).log().reshape(1, 4, 1, 1))
        tensor([0.5000], dtype=torch.float64)
    """
    entropy = torch.special.entr(_probabilities(logits)).sum(1)
    return 1 - (_mean_over_pixels(entropy) / math.log(logits.shape[1])).clamp(0, 1)


def expected_iou(logits: Tensor, *, power: float = 0.0) -> Tensor:
    """The mean IoU that an image's mask would have if its probabilities were right; not of the paper.

    Let a mask give the class *c* to the pixels *M*, and let *p* be the probability of *c* at each pixel. The sum of
    *p* over *M* is then how many of these are right, and its sum over all pixels how many there are of the class; both
    give the class an IoU. The score is the mean over the classes in the mask. It is to
    :func:`stseg.functional.mean_confidence` what the mean IoU is to the share of right pixels.

    Args:
        logits: ``(B, K, H, W)`` floats; log probabilities will do.
        power: the IoU of each class weighs as this power of its area, the expected union; 0 or more.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``; NaN for images with NaN logits.

    Raises:
        ValueError: if logits are not 4-dimensional floats of two or more classes and one or more pixels, or ``power``
            is out of its range.

    Example:
        >>> expected_iou(torch.tensor([[0.9, 0.6], [0.1, 0.4]]).log().reshape(1, 2, 1, 2))
        tensor([0.7500], dtype=torch.float64)
    """
    _check_power(power)
    probabilities = _countable(_probabilities(logits)).flatten(2)
    mask = logits.argmax(1).to(probabilities.device)
    area = _class_areas(mask, logits.shape[1])
    own = probabilities.gather(1, mask.flatten(1)[:, None])[:, 0].double()
    common = torch.zeros_like(area, dtype=torch.float64).scatter_add(1, mask.flatten(1), own)
    union = area + probabilities.sum(2, dtype=torch.float64) - common
    return _mean_over_classes(common, union, area > 0, power)


def _checked_masks(masks: Tensor, reference: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Both as int64, checked to go together."""
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
    return masks, reference


def _overlaps(masks: Tensor, reference: Tensor, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each mask and the reference: ``(B, K)`` int64 pixels that both give to a class, and that either does."""
    masks, reference = _checked_masks(masks, reference, num_classes)
    area = _class_areas(reference, num_classes)
    for mask in masks:
        # Where the two differ, the pixel goes to one class more, which is then left out.
        common = _class_areas(torch.where(mask == reference, mask, num_classes), num_classes + 1)[:, :-1]
        yield common, area + _class_areas(mask, num_classes) - common


def _probabilities(logits: Tensor) -> Tensor:
    if logits.ndim != 4 or not logits.is_floating_point() or logits.shape[1] < 2 or 0 in logits.shape[2:]:
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}; expected float (B, K, H, W) of two or more "
            "classes and one or more pixels"
        )
    return (logits.float() if logits.dtype.itemsize < 4 else logits).softmax(1)


def _mean_over_pixels(values: Tensor) -> Tensor:
    """``(B, H, W)`` -> ``(B,)`` float64."""
    return _countable(values).flatten(1).mean(1, dtype=torch.float64)


def _mean_over_classes(common: Tensor, union: Tensor, counts: Tensor, power: float) -> Tensor:
    """``(B,)`` means of the IoU of the classes that count, each weighted by the power of its area; all ``(B, K)``."""
    # Areas as shares of the largest: their powers always fit into a float.
    area = torch.where(counts, union.double(), 0.0)
    weight = torch.where(counts, (area / area.amax(1, keepdim=True)) ** power, 0.0)
    return (torch.where(counts, common / union, 0.0) * weight).sum(1) / weight.sum(1)


def _check_power(power: float) -> None:
    if not 0 <= power < math.inf:
        raise ValueError(f"power is {power}; expected a finite number, 0 or more")


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
