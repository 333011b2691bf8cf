"""Helpers shared by the augmentations: validation of settings and batches, and uniform sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stseg.checks import check_image_range


def uniform(unit: Tensor, low: float, high: float) -> Tensor:
    return unit * (high - low) + low


def may_read(x: Tensor) -> bool:
    """Return whether values can be looked at for nothing: on a CPU, unless a graph is being captured."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def ordered_range(name: str, bounds: Sequence[float], *, low: float, high: float = math.inf) -> tuple[float, float]:
    """Return the two bounds as floats, checked to be above ``low``, in order and finite."""
    pair = isinstance(bounds, Sequence) and len(bounds) == 2
    if not (pair and low < bounds[0] <= bounds[1] <= high and bounds[1] < math.inf):
        expected = f"low <= high, both above {low:g}" + ("" if high == math.inf else f" and at most {high:g}")
        raise ValueError(f"{name} is {bounds!r}; expected (low, high) with {expected}")
    return float(bounds[0]), float(bounds[1])


def check_batch(images: Tensor, masks: Tensor, where: Tensor | None, checked_on: set[str] | None = None) -> None:
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}; expected float in [0, 1] (uint8 images: images.float() / 255)")
    if masks.dtype == torch.bool or masks.is_floating_point() or masks.is_complex():
        raise TypeError(f"masks are {masks.dtype}; expected an integer dtype")
    if images.ndim != 4 or 0 in images.shape[1:] or masks.shape != images.shape[:1] + images.shape[2:]:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and masks {tuple(masks.shape)}; "
            "expected (B, C, H, W) and (B, H, W), with pixels"
        )
    if where is not None and where.dtype != torch.bool:
        raise TypeError(f"where is {where.dtype}; expected bool")
    if where is not None and where.shape != images.shape[:1]:
        raise ValueError(f"where has shape {tuple(where.shape)}; expected ({len(images)},), one for each image")
    if checked_on is not None:
        check_image_range(images, checked_on, rows=where)


def check_images(tensors: tuple[Tensor, ...]) -> None:
    if not tensors or tensors[0].ndim != 4 or 0 in tensors[0].shape[2:]:
        came = f"tensors of the shapes {[tuple(x.shape) for x in tensors]}" if tensors else "nothing"
        raise ValueError(f"got {came}; expected images (B, C, H, W), with pixels, and tensors of equal B, H and W")
