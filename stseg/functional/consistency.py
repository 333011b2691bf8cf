"""Consistency of two views by confident labels: target, loss, and shares of pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stseg.distributed import all_reduce_sum
from stseg.functional._checks import check_same_shape
from stseg.functional.classes import check_classes
from stseg.functional.losses import mean_over_processes


def consistency_target(
    logits: Tensor, *, threshold: float, valid: Tensor | None = None, ignore_index: int = 255
) -> Tensor:
    """Make a target for one view from the logits of another view of the same pixels.

    The target is an integer map, so that augmentations treat it as a mask. Its pixels have a class, are not confident
    enough ("unsure": counted in the denominator only), or are ignored.

    Args:
        logits: ``(B, K, H, W)`` floats; no gradient flows back to them.
        threshold: least confidence, the probability of the most probable class, for which a pixel gets that class.
        valid: ``(B, H, W)`` bool, False where there is no image, such as in padding; None if all are valid.
        ignore_index: value of pixels that are not valid; must not be a class.

    Returns:
        ``(B, H, W)`` int64: a class, or K (K + 1 if that is the ignore index) where unsure, or ``ignore_index``.

    Raises:
        ValueError: if the threshold is not in [0, 1], or the ignore index is a class.

    Example:
        >>> logits = torch.tensor([[9.0, 0.0, 9.0], [0.0, 0.0, 0.0]]).reshape(1, 2, 1, 3)
        >>> consistency_target(logits, threshold=0.95, valid=torch.tensor([[[True, True, False]]]))
        tensor([[[  0,   2, 255]]])
    """
    num_classes = logits.shape[1]
    check_classes(num_classes, ignore_index)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a probability in [0, 1]")
    logits = logits.detach()
    # Not the arg max of the softmax: rounding creates ties.
    target, confidence = logits.argmax(1), logits.float().softmax(1).amax(1)
    unsure = num_classes + int(ignore_index == num_classes)
    target = torch.where(confidence >= threshold, target, unsure)
    return target if valid is None else torch.where(valid, target, ignore_index)


def consistency_loss(logits: Tensor, target: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Compute the cross-entropy summed over the sure pixels of a target, divided by the number of valid pixels.

    The unsupervised loss of FixMatch for segmentation as in UniMatch (Yang et al., CVPR 2023, section 3.1).

    Args:
        logits: ``(B, K, H, W)`` floats.
        target: ``(B, H, W)`` int64, from :func:`consistency_target`, augmented or not.
        ignore_index: value of ignored pixels.

    Returns:
        Scalar: the sum over sure pixels divided by the number of sure and unsure ones, over all processes; 0 if there
        are none.

    Example:
        >>> consistency_loss(torch.zeros(1, 2, 1, 3), torch.tensor([[[0, 2, 255]]]))  # log(2) / 2
        tensor(0.3466)
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    learned = torch.where(_sure(target, logits.shape[1]), target.long(), ignore_index)
    total = F.cross_entropy(logits, learned, ignore_index=ignore_index, reduction="sum")
    return mean_over_processes(total, (target != ignore_index).sum())


def sure_share(target: Tensor, num_classes: int, *, ignore_index: int = 255) -> Tensor:
    """Compute the share of sure pixels among those that are not ignored.

    Args:
        target: ``(B, H, W)`` int64, from :func:`consistency_target`.
        num_classes: number of classes.
        ignore_index: value of ignored pixels.

    Returns:
        float32 scalar, whose mean over the processes is the share of all their pixels; 0 if none counts.

    Example:
        >>> sure_share(torch.tensor([[[0, 2, 255]]]), num_classes=2)
        tensor(0.5000)
    """
    return mean_over_processes(_sure(target, num_classes).sum().float(), (target != ignore_index).sum())


def confident_share(confidence: Tensor, *, threshold: float, where: Tensor | None = None) -> Tensor:
    """Compute the share of confident pixels, by which CutMix-Seg and ClassMix weight the consistency of a whole batch.

    Args:
        confidence: ``(B, H, W)`` floats, the probability of the most probable class.
        threshold: least confidence of a confident pixel.
        where: ``(B, H, W)`` bool, the pixels that count; None for all.

    Returns:
        float32 scalar without a gradient, the same in all processes: the share of all their pixels; 0 if none counts.

    Raises:
        ValueError: if the shape of ``where`` does not match.

    Example:
        >>> where = torch.tensor([[[True, True, False]]])
        >>> confident_share(torch.tensor([[[0.99, 0.5, 0.99]]]), threshold=0.97, where=where)
        tensor(0.5000)
    """
    where = torch.ones_like(confidence, dtype=torch.bool) if where is None else where
    check_same_shape("where", where, "confidence", confidence)
    confident, count = all_reduce_sum(torch.stack([((confidence >= threshold) & where).sum(), where.sum()]))
    share: Tensor = confident / count.clamp(min=1)
    return share


def _sure(target: Tensor, num_classes: int) -> Tensor:
    return (target >= 0) & (target < num_classes)
