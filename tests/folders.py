"""Folders of small images and masks for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def picture(index: int, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    """A bright square on a dark ground, ``(H, W, 3)``; other images are other squares."""
    rng = np.random.default_rng(index)
    pixels = rng.integers(0, 90, (*size, 3), dtype=np.uint8)
    top, left = rng.integers(0, 20, 2)
    pixels[top : top + 16, left : left + 16] += 150
    return pixels


def write_folders(
    root: Path, *, masked: int = 4, plain: int = 6, values: tuple[int, int] = (0, 255), suffix: str = ".png"
) -> Path:
    """Write ``images`` and ``masks``: the first ``masked`` of all images have a mask."""
    for index in range(masked + plain):
        pixels = picture(index)
        save(pixels, root / "images" / f"{index:02d}{suffix}")
        if index < masked:
            save(
                np.where(pixels[..., 0] >= 150, values[1], values[0]).astype(np.uint8),
                root / "masks" / f"{index:02d}.png",
            )
    return root


def save(pixels: np.ndarray, path: Path) -> Path:
    """Save an image, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path
