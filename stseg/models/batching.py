"""How many images a forward pass takes."""

from __future__ import annotations

import torch

_MOST_PIXELS = 3 << 16  # of a forward pass on a CPU, such as 4 images of 192 x 256


def images_per_pass(device: torch.device, height: int, width: int, most: int) -> int:
    """Return how many images of a size are computed fastest together, ``most`` or fewer.

    On a CPU, the feature maps of many pixels do not fit into its caches, and several large images take longer together
    than one after the other (``benchmarks/inference.py``); small ones gain. Other devices get as many as there may be.

    Example:
        >>> cpu = torch.device("cpu")
        >>> images_per_pass(cpu, 96, 128, 8), images_per_pass(cpu, 360, 480, 8)
        (8, 1)
    """
    if device.type != "cpu":
        return most
    return max(1, min(most, _MOST_PIXELS // max(1, height * width)))
