"""Image-level scores from the agreement of several checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stseg.functional._areas import check_power, class_areas, mean_over_classes
from stseg.functional._checks import check_range, countable, indices


def stability(masks: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """Compute the agreement of earlier predictions with the last one for each image.

    The image-level reliability of ST++ (Yang et al., CVPR 2022, section 3.3): the mean, over the earlier
    checkpoints, of the per-image mean IoU between their mask and the reference mask. Classes in
    neither mask are ignored.

    Args:
        masks: ``(K, B, H, W)`` integer class maps of K earlier checkpoints.
        reference: ``(B, H, W)`` class map of the last checkpoint.
        num_classes: number of classes; every value must lie in ``[0, num_classes)``.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``; 1 where all checkpoints agree everywhere.

    Raises:
        ValueError: if shapes do not match, ``masks`` holds no checkpoint, or a value is not a valid class index.

    Example:
        >>> stability(torch.zeros(2, 1, 4, 4, dtype=torch.long), torch.zeros(1, 4, 4, dtype=torch.long), 3)
        tensor([1.], dtype=torch.float64)
    """
    return compute_stability(*_checked_masks(masks, reference, num_classes), num_classes)


def compute_stability(masks: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """Compute :func:`stability` of valid int64 class maps, without checks."""
    scores = []
    for common, union in _overlaps(masks, reference, num_classes):
        ratio = torch.where(union > 0, common.double() / union.clamp(min=1), 0.0)
        scores.append(ratio.sum(1) / (union > 0).sum(1))
    return torch.stack(scores).mean(0)


def weighted_stability(
    masks: Tensor, reference: Tensor, num_classes: int, *, power: float = 0.25, min_share: float = 0.0
) -> Tensor:
    """Compute stability with classes weighted by area and small regions left out; not part of the paper.

    In the paper, a class of a few pixels has the same weight as one that fills the image. Here the IoU of each class
    is weighted by its area to the ``power``, where area means the union of the two masks. With ``power=0`` and
    ``min_share=0`` it is :func:`stseg.functional.stability`. With ``power=1`` an earlier mask scores ``a / (2 - a)``,
    where ``a`` is its share of equal pixels: for a single earlier mask, this ranks images as
    :func:`stseg.functional.pixel_agreement` does.

    Args:
        masks: ``(K, B, H, W)`` integer class maps of K earlier checkpoints.
        reference: ``(B, H, W)`` class map of the last checkpoint.
        num_classes: number of classes; every value must lie in ``[0, num_classes)``.
        power: exponent of the area; 0 or more.
        min_share: smallest share of the image for a class to count; in ``[0, 1]``. The
            largest class always counts.

    Returns:
        ``(B,)`` float64 scores in ``[0, 1]``; 1 where all checkpoints agree everywhere (small regions apart).

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
    check_power(power)
    if not 0 <= min_share <= 1:
        raise ValueError(f"min_share is {min_share}; expected a share in [0, 1]")
    least = min_share * math.prod(reference.shape[1:]) - 1e-9  # 0.1 * 30 is 3.0000000000000004 in floating point
    scores = []
    for common, union in _overlaps(*_checked_masks(masks, reference, num_classes), num_classes):
        largest = union.amax(1, keepdim=True).double()
        counts = (union > 0) & (union >= largest.clamp(max=least))
        scores.append(mean_over_classes(common.double(), union, counts, power))
    return torch.stack(scores).mean(0)


def pixel_agreement(masks: Tensor, reference: Tensor, num_classes: int) -> Tensor:
    """Compute the share of pixels on which earlier predictions agree with the last one; not part of the paper.

    The mean over the earlier checkpoints. Unlike in :func:`stseg.functional.stability`, every pixel has
    the same weight.

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
    equal = countable((masks == reference).flatten(2).sum(2))
    return (equal.double() / max(1, math.prod(reference.shape[1:]))).mean(0)


def _checked_masks(masks: Tensor, reference: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return both as int64, checked to match."""
    if masks.ndim != 4 or reference.ndim != 3 or masks.shape[1:] != reference.shape:
        raise ValueError(
            f"masks have shape {tuple(masks.shape)} and reference {tuple(reference.shape)}; "
            "expected (K, B, H, W) and (B, H, W)"
        )
    if masks.shape[0] == 0:
        raise ValueError("masks hold no checkpoint; expected one or more beside the reference")
    if reference[0:1].numel() == 0 and reference.shape[0]:
        raise ValueError(f"reference has shape {tuple(reference.shape)}: images without pixels")
    masks, reference = indices("masks", masks), indices("reference", reference)
    check_range("masks", masks, num_classes)
    check_range("reference", reference, num_classes)
    return masks, reference


def _overlaps(masks: Tensor, reference: Tensor, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each mask, the intersection and union with the reference by class: ``(B, K)`` int64 pixels."""
    area = class_areas(reference, num_classes)
    for mask in masks:
        # Where the two differ, the pixel is counted in an extra class, which is then dropped.
        common = class_areas(torch.where(mask == reference, mask, num_classes), num_classes + 1)[:, :-1]
        yield common, area + class_areas(mask, num_classes) - common
