"""CutMix with large rectangles, as CutMix-Seg and CPS draw them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from stseg.augment._settings import check_images, ordered_range, uniform
from stseg.checks import check_count
from stseg.functional.mixing import box_mask, paste


@dataclass(frozen=True)
class BoxMix:
    """CutMix with large rectangles (French et al., BMVC 2020), the mixing of CutMix-Seg and of CPS.

    A rectangle covers a share ``area`` of the image and always fits: its height is a share of the image's that is
    log-uniform from ``area`` to 1, its position is uniform over those inside. With several rectangles each covers an
    equal part of a share of its own, and where two overlap, the image stays: each inverts the mask.

    Image i gets the rectangles of image i + 1, and the last one those of the first.

    Args:
        area: smallest and largest share of the image, uniform, in (0, 1]: exactly one half in CutMix-Seg,
            ``(0.25, 0.5)`` in CPS.
        boxes: rectangles of an image: 1 in CutMix-Seg, 3 in CPS.

    Shape:
        As for :class:`CutMix`.

    Raises:
        TypeError: if ``boxes`` is not an integer.
        ValueError: if a setting is out of its range; when called, if the shapes do not match.

    Example:
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])[:, None, None].expand(2, 32, 32)
        >>> new_images, new_masks = BoxMix()(images, masks)
        >>> new_masks.float().mean((1, 2)).sub(0.5).abs().max() < 0.04
        tensor(True)
    """

    area: tuple[float, float] = (0.5, 0.5)
    boxes: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "area", ordered_range("area", self.area, low=0.0, high=1.0))
        check_count("boxes", self.boxes)

    def __call__(self, *tensors: Tensor, generator: Generator | None = None) -> tuple[Tensor, ...]:
        """Draw rectangles for the first tensor and mix all tensors in the same way."""
        check_images(tensors)
        return self.transform(self.draw(tensors[0], generator), *tensors)

    def draw(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw for images ``(B, C, H, W)``, from ``generator`` or the default one of the device.

        Returns:
            Rectangles ``(B, boxes, 4)`` int64, half-open: top, left, bottom, right.
        """
        batch, _, height, width = images.shape
        draws = torch.rand(4, batch, self.boxes, generator=generator, device=images.device)
        area, (part, down, across) = uniform(draws[0], *self.area), draws[1:]
        tall, side = area**part, math.sqrt(1 / self.boxes)
        rows, columns = (tall * side * height).round(), (area / tall * side * width).round()
        top, left = ((height - rows) * down).round(), ((width - columns) * across).round()
        return torch.stack([top, left, top + rows, left + columns], 2).long()

    def transform(self, boxes: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Paste the rectangles of the next image; deterministic."""
        mixed = []
        for tensor in tensors:
            height, width = tensor.shape[-2:]
            inside = box_mask(boxes.flatten(0, 1), height, width).view(*boxes.shape[:2], height, width)
            mixed.append(paste(inside.sum(1) % 2 == 1, tensor, tensor.roll(-1, 0)))
        return tuple(mixed)
