"""Flaw maps of GCT (Ke et al., ECCV 2020): where predictions are wrong, and whose prediction to follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stseg.functional.classes import one_hot


def gaussian_blur(maps: Tensor, size: int) -> Tensor:
    """Blur maps by a Gaussian of a given kernel, with reflected borders.

    Args:
        maps: ``(B, H, W)`` floats.
        size: side of the kernel, odd; its sigma is ``0.3 ((size - 1) / 2 - 1) + 0.8``. A kernel that reaches beyond the
            opposite border is made smaller.

    Returns:
        ``(B, H, W)``.

    Example:
        >>> gaussian_blur(torch.ones(1, 5, 5), 3).unique()
        tensor([1.])
    """
    with torch.autocast(maps.device.type, enabled=False):
        return _blurred(maps.float(), size)


def _blurred(maps: Tensor, size: int) -> Tensor:
    half = (size - 1) // 2
    sigma = 0.3 * (half - 1) + 0.8
    for axis in (-2, -1):
        reach = min(half, maps.shape[axis] - 1)
        kernel = torch.exp(-torch.arange(-reach, reach + 1, device=maps.device).float().square() / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).to(maps.dtype)
        shape, pad = ((-1, 1), (0, 0, reach, reach)) if axis == -2 else ((1, -1), (reach, reach, 0, 0))
        maps = F.conv2d(F.pad(maps[:, None], pad, mode="reflect"), kernel.reshape(1, 1, *shape))[:, 0]
    return maps


def true_flaws(probabilities: Tensor, masks: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Compute where predictions are wrong: the target of a flaw detector.

    Half the sum over classes of the difference of prediction and mask, blurred, dilated by 3 x 3 and blurred again, and
    scaled to [0, 1] in each image. The kernels are an eighth and a quarter of the longer side (section 3.3).

    Args:
        probabilities: ``(B, K, H, W)`` floats.
        masks: ``(B, H, W)`` integers. Ignored pixels are no flaws (in the authors' code they are half ones).
        ignore_index: mask value of ignored pixels.

    Returns:
        ``(B, H, W)`` float32 in [0, 1], without gradient.

    Example:
        >>> probabilities = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 16, 16)
        >>> float(true_flaws(probabilities, torch.zeros(1, 16, 16, dtype=torch.int64)).max())
        0.0
    """
    probabilities, side = probabilities.detach().float(), max(masks.shape[-2:])
    difference = (one_hot(masks, probabilities.shape[1]) - probabilities).abs().sum(1) / 2
    flaws = gaussian_blur(difference * (masks != ignore_index), odd(side // 8))
    flaws = F.max_pool2d(F.pad(flaws[:, None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[:, 0]
    return _scaled(gaussian_blur(flaws, odd(side // 4)))


def clean_flaws(flaws: Tensor, *, threshold: float = 0.6, least: float = 0.1) -> Tensor:
    """Turn the output of a flaw detector into maps that can be compared (section 3.2).

    Negative values become 0, maps are blurred by a kernel of a sixteenth of the longer side, those whose maximum is at
    most ``least`` become 0, the others are scaled to [0, 1], and values above ``threshold`` become 1.

    Args:
        flaws: ``(B, H, W)`` floats.
        threshold: value from which a pixel is bad.
        least: maximum up to which an image has no flaws.

    Returns:
        ``(B, H, W)`` float32, without gradient.

    Example:
        >>> clean_flaws(torch.full((1, 4, 4), 0.05)).max()
        tensor(0.)
    """
    blurred = gaussian_blur(flaws.detach().float().clamp(min=0), odd(max(flaws.shape[-2:]) // 16))
    scaled = _scaled(blurred) * (blurred.amax((1, 2), keepdim=True) > least)
    return torch.where(scaled > threshold, 1.0, scaled)


def odd(number: int) -> int:
    """Return the number if it is odd, else the next one.

    Example:
        >>> [odd(n) for n in (64, 128, 32, 41)]
        [65, 129, 33, 41]
    """
    return number + 1 - number % 2


def _scaled(maps: Tensor) -> Tensor:
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-3)  # rounding is not stretched
