"""Pixels near the contours of masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stseg.checks import check_count
from stseg.functional._checks import indices


def boundary_region(masks: Tensor, distance: int) -> Tensor:
    """Find the pixels within a distance of the contour of the region of their class.

    The boundary region of Boundary IoU (Cheng et al., CVPR 2021), of all classes at once: what erosion by a 3 x 3
    square, applied ``distance`` times, takes from the mask of a class. Beyond the border of the image is no class, so a
    mask that the border cuts off has a contour there.

    Args:
        masks: ``(..., H, W)`` integers: class maps, or binary masks. Every value is a class here, the ignore index too.
        distance: in pixels, 1 or more.

    Returns:
        ``(..., H, W)`` bool.

    Raises:
        ValueError: if there are less than two dimensions, or the distance is not positive.
        TypeError: if the masks are not integral or bool, or the distance is not an integer.

    Example:
        >>> boundary_region(torch.tensor([[0, 0, 0, 0, 0, 1, 1]] * 7), 1)[3].int()
        tensor([1, 0, 0, 0, 1, 1, 1], dtype=torch.int32)
    """
    check_count("distance", distance)
    if masks.ndim < 2:
        raise ValueError(f"masks have shape {tuple(masks.shape)}; expected (..., H, W)")
    return find_boundary_region(indices("masks", masks), distance)


def find_boundary_region(masks: Tensor, distance: int) -> Tensor:
    """Compute :func:`boundary_region` of masks of signed integers, without checks."""
    height, width = masks.shape[-2:]
    if not masks.numel():
        return torch.zeros_like(masks, dtype=torch.bool)
    outside = torch.iinfo(masks.dtype).min
    padded = masks.new_full((*masks.shape[:-2], height + 2 * distance, width + 2 * distance), outside)
    padded[..., distance : distance + height, distance : distance + width] = masks
    # A square around a pixel holds one value alone where its least is its greatest.
    least, greatest = (_pool(padded, 2 * distance + 1, choose) for choose in (torch.minimum, torch.maximum))
    return least != greatest


def _pool(values: Tensor, side: int, choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Pool over all squares of a side, by windows that double in length: the time is logarithmic in the side."""
    for dim in (-1, -2):
        length = 1
        while length < side:
            shift = min(length, side - length)
            rest = values.shape[dim] - shift
            values = choose(values.narrow(dim, 0, rest), values.narrow(dim, shift, rest))
            length += shift
    return values
