"""Cutout for images and their masks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Generator, Tensor

from stseg.augment._boxes import TRIES, draw_boxes
from stseg.augment._settings import check_batch, may_read, ordered_range
from stseg.checks import check_probability
from stseg.functional.mixing import box_mask


@dataclass(frozen=True)
class Cutout:
    """Cutout: one rectangle of noise per image, ignored in the mask.

    A rectangle covers a share ``area`` of the image and has the height / width ratio ``ratio``, both uniform; its
    upper left corner is uniform over the image. All of these are redrawn until the rectangle lies inside the image,
    which favors small ones, as in the paper's runs. If none fits within 256 draws, the image is left unchanged
    (in practice only for extreme settings, such as an area of 1). Inside, the image gets uniform noise in [0, 1),
    independent for each pixel and channel, and the mask ``ignore_index``.

    Args:
        p: probability that an image gets a rectangle.
        area: smallest and largest share of the image, in (0, 1].
        ratio: smallest and largest height / width.
        ignore_index: mask value inside the rectangle.

    Raises:
        ValueError: if a setting is out of its range.

    Example:
        >>> images, masks = torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.uint8)
        >>> cut_images, cut_masks = Cutout(p=1.0)(images, masks)
        >>> bool(((cut_masks == 255) == (cut_images > 0).any(1)).all())
        True
    """

    p: float = 0.5
    area: tuple[float, float] = (0.02, 0.4)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)
    ignore_index: int = 255

    def __post_init__(self) -> None:
        check_probability("p", self.p)
        object.__setattr__(self, "area", ordered_range("area", self.area, low=0.0, high=1.0))
        object.__setattr__(self, "ratio", ordered_range("ratio", self.ratio, low=0.0))

    def __call__(
        self,
        images: Tensor,
        masks: Tensor,
        where: Tensor | None = None,
        *,
        generator: Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw and apply; arguments as for :class:`StrongAugment`."""
        check_batch(images, masks, where)
        return self.transform(images, masks, *self.draw(images, generator), where)

    def draw(self, images: Tensor, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw for images ``(B, C, H, W)``, from ``generator`` or the default one of the device.

        Returns:
            Rectangles ``(B, 4)`` int64, half-open: top, left, bottom, right, all 0 for none; and noise
            ``(B, C, H, W)`` float32. On a CPU, where random numbers take long, it is 0 outside the rectangles.
        """
        boxes = draw_boxes(images, p=self.p, area=self.area, ratio=self.ratio, areas=TRIES, generator=generator)
        if not may_read(images):
            return boxes, torch.rand(images.shape, generator=generator, device=images.device)
        noise = torch.zeros(images.shape)
        for i, pixels in _pixels(boxes):
            noise[i][pixels].uniform_(generator=generator)
        return boxes, noise

    def transform(
        self, images: Tensor, masks: Tensor, boxes: Tensor, noise: Tensor, where: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Fill the rectangles with the noise.

        Raises:
            ValueError: if ``ignore_index`` does not fit into the dtype of the masks.
        """
        limits = torch.iinfo(masks.dtype)
        if not limits.min <= self.ignore_index <= limits.max:
            raise ValueError(f"ignore_index {self.ignore_index} of the cutout does not fit into masks of {masks.dtype}")
        if may_read(images):
            images, masks = images.clone(), masks.clone()
            for i, pixels in _pixels(boxes if where is None else boxes * where[:, None]):
                images[i][pixels] = noise[i][pixels].to(images.dtype)
                masks[i][pixels] = self.ignore_index
            return images, masks
        inside = box_mask(boxes, *masks.shape[1:])
        if where is not None:
            inside = inside & where[:, None, None]
        return torch.where(inside[:, None], noise.to(images.dtype), images), masks.masked_fill(
            inside, self.ignore_index
        )


def _pixels(boxes: Tensor) -> Iterator[tuple[int, tuple[EllipsisType, slice, slice]]]:
    """Yield the number of each image that has a rectangle, and the index of the pixels in it."""
    for i, (top, left, bottom, right) in enumerate(boxes.tolist()):
        if bottom > top and right > left:
            yield i, (..., slice(top, bottom), slice(left, right))
