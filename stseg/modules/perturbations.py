"""Perturbations of features, as CCT makes them (Ouali et al., CVPR 2020, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def feature_noise(features: Tensor, scale: float = 0.3) -> Tensor:
    """Add noise in proportion to the features, the same to every image: ``z + z n`` with n uniform in +-``scale``.

    Example:
        >>> feature_noise(torch.ones(2, 3, 4, 4)).sub(1).abs().max() <= 0.3
        tensor(True)
    """
    noise = torch.rand(features.shape[1:], device=features.device, dtype=features.dtype)
    return features * (1 + scale * (2 * noise - 1))


def feature_drop(features: Tensor, low: float = 0.7, high: float = 0.9) -> Tensor:
    """Zero the positions of an image whose mean over channels is above a share of the largest one.

    The share is drawn once for the batch, uniformly from ``low`` to ``high``.

    Example:
        >>> features = torch.tensor([1.0, 0.2]).reshape(1, 1, 1, 2)
        >>> feature_drop(features).flatten()
        tensor([0.0000, 0.2000])
    """
    attention = features.mean(1, keepdim=True)
    share = low + (high - low) * torch.rand((), device=features.device)
    return features * (attention <= share * attention.amax((2, 3), keepdim=True))


def mask_context(features: Tensor, foreground: Tensor) -> Tensor:
    """Keep the foreground only: features ``(B, C, h, w)`` and bool ``(B, h, w)``.

    Example:
        >>> mask_context(torch.ones(1, 1, 1, 2), torch.tensor([[[True, False]]])).flatten()
        tensor([1., 0.])
    """
    return features * foreground[:, None]


def mask_objects(features: Tensor, foreground: Tensor) -> Tensor:
    """Keep the background only: features ``(B, C, h, w)`` and bool ``(B, h, w)``.

    Example:
        >>> mask_objects(torch.ones(1, 1, 1, 2), torch.tensor([[[True, False]]])).flatten()
        tensor([0., 1.])
    """
    return features * ~foreground[:, None]


def guided_cutout(features: Tensor, foreground: Tensor, *, share: float = 0.4, least: int = 2) -> Tensor:
    """Zero a random rectangle of each object.

    An object is a connected region of the foreground, with its corners, at the resolution of the features. The sides of
    the rectangle are ``share`` times those of the object's bounding box, in which it lies.

    Args:
        features: ``(B, C, h, w)``.
        foreground: ``(B, h, w)`` bool.
        share: sides of the rectangle in sides of the box; at least one position is zeroed.
        least: objects of fewer positions are left.

    Returns:
        New features of the same shape.

    Example:
        >>> foreground = torch.zeros(1, 8, 8, dtype=torch.bool)
        >>> foreground[:, 2:7, 1:6] = True
        >>> int((guided_cutout(torch.ones(1, 1, 8, 8), foreground) == 0).sum())
        4
    """
    keep = torch.ones_like(foreground)
    regions = connected_regions(foreground)
    for image, region in zip(*_objects(regions, least), strict=True):
        rows, columns = (torch.nonzero((regions[image] == region).any(axis))[:, 0] for axis in (1, 0))
        sides = [max(1, round(share * int(span[-1] - span[0] + 1))) for span in (rows, columns)]
        room = [int(span[-1] - span[0] + 1) - side for span, side in zip((rows, columns), sides, strict=True)]
        offset = [int(torch.randint(space + 1, (), device=features.device)) for space in room]
        top, left = int(rows[0]) + offset[0], int(columns[0]) + offset[1]
        keep[image, top : top + sides[0], left : left + sides[1]] = False
    return features * keep[:, None]


def connected_regions(mask: Tensor) -> Tensor:
    """Number the connected regions of masks, corners included.

    Args:
        mask: ``(B, H, W)`` bool.

    Returns:
        ``(B, H, W)`` int64: a positive number for each region of an image, 0 elsewhere.

    Example:
        >>> connected_regions(torch.tensor([[[True, False, True], [True, False, False]]])).unique().tolist()
        [0, 3, 4]
    """
    height, width = mask.shape[1:]
    number = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float64).reshape(1, height, width)
    regions = number * mask
    while True:  # the highest number spreads through each region
        spread = F.max_pool2d(regions[:, None], 3, stride=1, padding=1)[:, 0] * mask
        if torch.equal(spread, regions):
            return regions.long()
        regions = spread


def adversarial_direction(decode: Callable[[Tensor], Tensor], features: Tensor, *, length: float = 2.0) -> Tensor:
    """Compute the perturbation of a given length that changes a decoder's prediction most (virtual adversarial).

    One power iteration from a random direction d towards the largest Kullback-Leibler divergence of the probabilities.
    For a small change along d its gradient is ``J' S J d``, where J is the derivative of the logits and S that of the
    softmax. The product is computed as it is: the quotient of the authors, for a change of 1e-6, is below the precision
    of float32.

    Args:
        decode: from features to logits ``(B, K, h', w')``; its parameters get no gradients.
        features: ``(B, C, h, w)``; no gradient flows back to them.
        length: length of the result, for each image.

    Returns:
        ``(B, C, h, w)`` without gradient.

    Example:
        >>> decode = torch.nn.Conv2d(3, 2, 1)
        >>> adversarial_direction(decode, torch.rand(2, 3, 4, 4)).flatten(1).norm(dim=1).round(decimals=3)
        tensor([2., 2.])
    """
    with torch.autocast(features.device.type, enabled=False):
        origin = features.detach().float()
        direction = _unit(torch.rand_like(origin) - 0.5)
        derivative: Any = torch.func.jvp(decode, (origin,), (direction,))
        logits, change = derivative
        probability = logits.softmax(1)
        change = probability * (change - (probability * change).sum(1, keepdim=True))
        (gradient,) = torch.func.vjp(decode, origin)[1](change)
        return (_unit(gradient) * length).detach().to(features.dtype)


def _unit(direction: Tensor) -> Tensor:
    norm = direction.flatten(1).norm(dim=1).reshape(-1, *[1] * (direction.ndim - 1))
    unit: Tensor = direction / (norm + torch.finfo(direction.dtype).tiny)
    return unit


def _objects(regions: Tensor, least: int) -> tuple[list[int], list[int]]:
    """Return image and number of each region of at least so many positions."""
    images, numbers = [], []
    for image, region in enumerate(regions):
        found, counts = region[region > 0].unique(return_counts=True)
        numbers += found[counts >= least].tolist()
        images += [image] * int((counts >= least).sum())
    return images, numbers
