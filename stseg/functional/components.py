"""Connected components of masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def connected_components(masks: Tensor) -> Tensor:
    """Number the connected components of masks; pixels that touch at a corner are connected.

    Numbers spread from pixel to pixel, one pixel in each of ``H + W`` rounds, all on the device of the masks. A
    component whose pixels are farther apart than that along the shortest way inside it, such as a spiral, is split.

    Args:
        masks: ``(B, H, W)`` bool.

    Returns:
        ``(B, H, W)`` int64: 0 outside, else the number of the component, which is 1 more than the index of its last
        pixel in the flattened image.

    Raises:
        ValueError: if the masks do not have 3 dimensions.

    Example:
        >>> connected_components(torch.tensor([[[1, 1, 0, 1], [0, 0, 0, 1]]]).bool())
        tensor([[[2, 2, 0, 8],
                 [0, 0, 0, 8]]])
    """
    if masks.ndim != 3:
        raise ValueError(f"masks have shape {tuple(masks.shape)}; expected (B, H, W)")
    height, width = masks.shape[-2:]
    # Exact in floats up to 2**24 pixels; max_pool2d takes no integers on a GPU.
    index = torch.arange(1, height * width + 1, device=masks.device, dtype=torch.float32).view(height, width)
    inside = masks.float()
    number = index * inside
    for _ in range(height + width):
        number = F.max_pool2d(number, kernel_size=3, stride=1, padding=1) * inside
    return number.long()
