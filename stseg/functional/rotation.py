"""Rotations of a batch by quarter turns."""

from __future__ import annotations

import torch
from torch import Tensor


def turn(tensor: Tensor, quarters: Tensor) -> Tensor:
    """Rotate each image of a batch clockwise by quarter turns.

    Args:
        tensor: ``(B, C, S, S)`` or ``(B, S, S)``, square.
        quarters: ``(B,)`` integers, the number of quarter turns of each image.

    Returns:
        A new tensor of the same shape.

    Raises:
        ValueError: if the images are not square, or there is not a number for each.

    Example:
        >>> turn(torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([1]))
        tensor([[[3, 1],
                 [4, 2]]])
    """
    if tensor.ndim not in (3, 4) or tensor.shape[-1] != tensor.shape[-2] or quarters.shape != tensor.shape[:1]:
        raise ValueError(
            f"the batch has shape {tuple(tensor.shape)} and quarters {tuple(quarters.shape)}; expected square images, "
            "(B, C, S, S) or (B, S, S), and (B,)"
        )
    turned = torch.stack([torch.rot90(tensor, -k, (-2, -1)) for k in range(4)])
    return turned[quarters % 4, torch.arange(len(tensor), device=tensor.device)]
