"""Mixing of images: rectangles as masks, and pasting."""

from __future__ import annotations

import torch
from torch import Tensor


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
