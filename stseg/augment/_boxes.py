"""Random rectangles, one per image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from stseg.augment._settings import uniform

TRIES = 256


def draw_boxes(
    images: Tensor,
    *,
    p: float,
    area: tuple[float, float],
    ratio: tuple[float, float],
    areas: int,
    generator: Generator | None,
) -> Tensor:
    """Draw ``(B, 4)`` int64 half-open rectangles: top, left, bottom, right; all 0 for none.

    Each is the first of 256 tries that lies inside the image. Every try draws a new ratio and a new corner, and a new
    area where ``areas`` is 256; if ``areas`` is 1, all tries of an image share one area.
    """
    batch, _, height, width = images.shape
    place: dict[str, Any] = {"generator": generator, "device": images.device}
    pixels = uniform(torch.rand(batch, areas, **place), *area) * (height * width)
    shape = uniform(torch.rand(batch, TRIES, **place), *ratio)
    top = torch.randint(height, (batch, TRIES), **place)
    left = torch.randint(width, (batch, TRIES), **place)
    bottom, right = top + (pixels * shape).sqrt().long(), left + (pixels / shape).sqrt().long()
    fits = (bottom <= height) & (right <= width)
    first = fits.int().argmax(1).view(-1, 1, 1).expand(-1, -1, 4)
    boxes = torch.stack((top, left, bottom, right), 2).gather(1, first)[:, 0]
    chosen = fits.any(1) & (torch.rand(batch, **place) < p)
    return boxes * chosen[:, None]
