"""Mixing of images: rectangles and classes as masks, and pasting."""

from __future__ import annotations

import torch
from torch import Tensor

from stseg.functional._checks import indices


def box_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Draw rectangles as masks.

    Args:
        boxes: ``(B, 4)`` integers, half-open: top, left, bottom, right.
        height: rows of the masks.
        width: columns of the masks.

    Returns:
        ``(B, H, W)`` bool on the device of the boxes, True inside.

    Example:
        >>> box_mask(torch.tensor([[0, 1, 2, 3]]), 2, 4).int()
        tensor([[[0, 1, 1, 0],
                 [0, 1, 1, 0]]], dtype=torch.int32)
    """
    top, left, bottom, right = boxes.view(-1, 4, 1, 1).unbind(1)
    row = torch.arange(height, device=boxes.device)[:, None]
    column = torch.arange(width, device=boxes.device)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def class_mask(labels: Tensor, order: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Choose half of the classes of each image: of n classes the first ``n // 2`` of an order.

    Args:
        labels: ``(B, H, W)`` integers; the ignore index, and values out of 0..K-1, are no classes.
        order: ``(B, K)`` floats up to 1, such as random ones: classes are chosen from the lowest value on.
        ignore_index: value that is no class.

    Returns:
        ``(B, H, W)`` bool: the pixels of the chosen classes.

    Raises:
        TypeError: if labels are not integers.
        ValueError: if the shapes do not match.

    Example:
        >>> class_mask(torch.tensor([[[0, 2, 3, 255]]]), torch.tensor([[0.4, 0.0, 0.9, 0.1]])).int()
        tensor([[[0, 0, 1, 0]]], dtype=torch.int32)
    """
    if labels.ndim != 3 or order.ndim != 2 or len(labels) != len(order):
        raise ValueError(
            f"labels have shape {tuple(labels.shape)} and order {tuple(order.shape)}; expected (B, H, W) and (B, K)"
        )
    flat, num_classes = indices("labels", labels).flatten(1), order.shape[1]
    known = (flat >= 0) & (flat < num_classes) & (flat != ignore_index)
    index = torch.where(known, flat, num_classes)  # one more column, for what is no class
    present = torch.zeros(len(flat), num_classes + 1, dtype=torch.bool, device=flat.device)
    present = present.scatter(1, index, True)[:, :num_classes]
    rank = order.masked_fill(~present, torch.inf).argsort(dim=1, stable=True).argsort(1)
    chosen = torch.cat([rank < present.sum(1, keepdim=True) // 2, torch.zeros_like(present[:, :1])], 1)
    return chosen.gather(1, index).view_as(labels)


def paste(where: Tensor, into: Tensor, source: Tensor) -> Tensor:
    """Replace pixels of one batch by those of another.

    Args:
        where: ``(B, H, W)`` bool, the pixels that are replaced.
        into: ``(B, C, H, W)`` or ``(B, H, W)``.
        source: the new pixels, of the same shape as ``into``.

    Returns:
        A new tensor of the same shape.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> paste(torch.tensor([[[True, False]]]), torch.tensor([[[1, 2]]]), torch.tensor([[[3, 4]]]))
        tensor([[[3, 2]]])
    """
    if into.shape != source.shape or into.ndim not in (3, 4) or where.shape != into.shape[:1] + into.shape[-2:]:
        raise ValueError(
            f"where has shape {tuple(where.shape)}, into {tuple(into.shape)} and source {tuple(source.shape)}; "
            "expected (B, H, W) and twice (B, C, H, W) or (B, H, W)"
        )
    return torch.where(where[:, None] if into.ndim == 4 else where, source, into)
