"""Two overlapping crops of one image, in data-loading workers."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from stseg.augment._settings import ordered_range
from stseg.augment.weak import WeakAugment
from stseg.checks import check_count, check_probability
from stseg.types import ImageLike

TRIES = 50


@dataclass(frozen=True)
class CropPair:
    """Two overlapping crops of one image, as DCC takes them (Lai et al., CVPR 2021, section 3.2).

    The image is resized as in :class:`stseg.WeakAugment` and, where it is smaller than a crop, padded on the right and
    at the bottom with 0. The first crop lies anywhere in it; the second one at a distance that is a multiple of
    ``stride`` in both directions. Both are drawn until their intersection over union lies in ``iou``; after 50 tries
    the second crop is the first. Each is then flipped horizontally on its own. Draws come from torch's global CPU
    generator.

    Args:
        crop_size: side of the square crops, or ``(height, width)``, in pixels; multiples of ``stride``.
        base_size: long side that ``scale`` multiplies, in pixels; ``None`` takes each image's own.
        scale: smallest and largest factor.
        stride: distance in pixels of the places that are compared.
        iou: smallest and largest intersection over union of the crops, in (0, 1].
        flip: probability of a horizontal flip.

    Shape:
        Image ``(C, H, W)`` uint8 or float in [0, 1], or PIL -> a dictionary: ``images`` ``(2, C, *crop_size)``;
        ``valid`` ``(2, *crop_size)`` bool, False in the padding; ``offset`` ``(2,)`` int64, how far the second crop
        lies below and to the right of the first, before the flips; ``flipped`` ``(2,)`` bool.

    Raises:
        TypeError: if ``stride`` is not an integer.
        ValueError: if a setting is out of its range.
        DataError: when called, if the image has an invalid shape.

    Example:
        >>> pair = CropPair(16, base_size=32, stride=8)(torch.rand(3, 40, 40))
        >>> pair["images"].shape, (pair["offset"] % 8).tolist()
        (torch.Size([2, 3, 16, 16]), [0, 0])
    """

    crop_size: int | tuple[int, int]
    _: KW_ONLY
    base_size: int | None = None
    scale: tuple[float, float] = (0.8, 2.0)
    stride: int = 8
    iou: tuple[float, float] = (0.1, 1.0)
    flip: float = 0.5

    def __post_init__(self) -> None:
        weak = WeakAugment(self.crop_size, base_size=self.base_size, scale=self.scale)  # checks all three
        assert isinstance(weak.crop_size, tuple)
        check_count("stride", self.stride)
        if any(side % self.stride for side in weak.crop_size):
            raise ValueError(f"crop_size is {self.crop_size}; expected multiples of stride, {self.stride}")
        object.__setattr__(self, "crop_size", weak.crop_size)
        object.__setattr__(self, "scale", weak.scale)
        object.__setattr__(self, "iou", ordered_range("iou", self.iou, low=0.0, high=1.0))
        check_probability("flip", self.flip)

    def __call__(self, image: ImageLike) -> dict[str, Tensor]:
        """Draw two crops of one image."""
        assert isinstance(self.crop_size, tuple)
        height, width = self.crop_size
        pixels, valid = self._resized(image)
        top, left = (_integer(0, side - crop) for side, crop in zip(valid.shape, self.crop_size, strict=True))
        down, right = 0, 0
        for _ in range(TRIES):
            first = [_integer(0, side - crop) for side, crop in zip(valid.shape, self.crop_size, strict=True)]
            steps = [
                _integer(-(start // self.stride), (side - crop - start) // self.stride)
                for start, side, crop in zip(first, valid.shape, self.crop_size, strict=True)
            ]
            if self.iou[0] <= self._iou(steps[0] * self.stride, steps[1] * self.stride) <= self.iou[1]:
                (top, left), (down, right) = first, (steps[0] * self.stride, steps[1] * self.stride)
                break
        flipped = torch.rand(2, device="cpu") < self.flip
        images, masks = [], []
        for (y, x), flip in zip(((top, left), (top + down, left + right)), flipped.tolist(), strict=True):
            axes = [-1] if flip else []
            images.append(pixels[..., y : y + height, x : x + width].flip(axes))
            masks.append(valid[y : y + height, x : x + width].flip(axes))
        offset = torch.tensor([down, right])
        return {"images": torch.stack(images), "valid": torch.stack(masks), "offset": offset, "flipped": flipped}

    def _resized(self, image: ImageLike) -> tuple[Tensor, Tensor]:
        """Return the image, resized and at least as large as a crop, and which of its pixels are not padding."""
        assert isinstance(self.crop_size, tuple)
        size = tuple(image.shape[-2:]) if isinstance(image, Tensor) else image.size[::-1]
        side = max(int((self.base_size or max(size)) * self.scale[1]), *self.crop_size)
        weak = WeakAugment(side, base_size=self.base_size, scale=self.scale, flip=0.0)
        pixels, mask = weak(image, torch.zeros(size, dtype=torch.uint8))
        valid = mask == 0
        height, width = int(valid[:, 0].sum()), int(valid[0].sum())
        window = (..., slice(max(height, self.crop_size[0])), slice(max(width, self.crop_size[1])))
        return pixels[window], valid[window]

    def _iou(self, down: int, right: int) -> float:
        assert isinstance(self.crop_size, tuple)
        height, width = self.crop_size
        common = max(0, height - abs(down)) * max(0, width - abs(right))
        return common / (2 * height * width - common)


def _integer(low: int, high: int) -> int:
    """Draw uniformly from ``low`` to ``high`` inclusive with the global CPU generator."""
    return int(torch.randint(low, high + 1, (), device="cpu"))
