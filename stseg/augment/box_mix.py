"""CutMix with boxes of a fixed share, as CutMix-Seg and CPS draw them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from stseg.augment._settings import ordered_range, uniform
from stseg.functional.mixing import box_mask, paste


@dataclass(frozen=True)
class BoxMix:
    """CutMix whose boxes cover a given share of each image: every image is mixed.

    As CutMix-Seg draws it (French et al., BMVC 2020): the share of the height is ``exp(u log(area))`` with u uniform in
    [0, 1], that of the width ``area`` by it; sides are rounded to pixels, and the position is uniform. With several
    ``boxes``, as in CPS (Chen et al., CVPR 2021), each has a share drawn from ``area``, with sides times
    ``sqrt(1 / boxes)``, and flips the mask: where two boxes overlap, the image itself is left.

    Image i gets its boxes from image B - 1 - i, so the middle image of an odd batch is mixed with itself. The authors
    take the second image from a second loader.

    Args:
        area: smallest and largest share of the image, in (0, 1].
        boxes: boxes an image; 1 or more.

    Shape:
        Any number of tensors ``(B, C, H, W)`` or ``(B, H, W)``, the first one ``(B, C, H, W)`` -> as many tensors of
        the same shapes and dtypes. The input is not modified.

    Raises:
        ValueError: if a setting is out of its range; when called, if the shapes do not match.

    Example:
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])[:, None, None].expand(2, 32, 32)
        >>> new_images, new_masks = BoxMix()(images, masks)
        >>> 0.4 < float((new_masks != masks).float().mean()) < 0.6
        True
    """

    area: tuple[float, float] = (0.5, 0.5)
    boxes: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", ordered_range("area", self.area, low=0.0, high=1.0))
        if self.boxes < 1:
            raise ValueError(f"boxes is {self.boxes}; expected 1 or more")

    def __call__(self, *tensors: Tensor, generator: Generator | None = None) -> tuple[Tensor, ...]:
        """Draw boxes for the first tensor and mix all tensors in the same way."""
        if not tensors or tensors[0].ndim != 4 or 0 in tensors[0].shape[2:]:
            came = f"tensors of the shapes {[tuple(x.shape) for x in tensors]}" if tensors else "nothing"
            raise ValueError(f"got {came}; expected images (B, C, H, W), with pixels, and tensors of equal B, H and W")
        return self.transform(self.draw(tensors[0], generator), *tensors)

    def draw(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw masks ``(B, H, W)`` bool for images ``(B, C, H, W)``: the pixels that are replaced."""
        batch, _, height, width = images.shape
        share, part, down, across = torch.rand(4, batch, self.boxes, generator=generator, device=images.device)
        area = uniform(share, *self.area)
        tall = area**part  # exp(u log area)
        size = math.sqrt(1 / self.boxes)
        rows, columns = (tall * size * height).round(), (area / tall * size * width).round()
        top, left = ((height - rows) * down).round(), ((width - columns) * across).round()
        corners = torch.stack([top, left, top + rows, left + columns], 2).long()
        inside = box_mask(corners.flatten(0, 1), height, width).reshape(batch, self.boxes, height, width)
        return inside.sum(1) % 2 == 1

    def transform(self, where: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Replace the pixels of the masks by those of the reversed batch; deterministic."""
        return tuple(paste(where, tensor, tensor.flip(0)) for tensor in tensors)
