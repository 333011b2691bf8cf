"""Weak augmentation of training images, one sample at a time in data-loading workers."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from stseg.augment._settings import ordered_range
from stseg.checks import check_probability
from stseg.data.convert import pair_of
from stseg.types import ImageLike, MaskLike


@dataclass(frozen=True)
class WeakAugment:
    """Weak augmentation of ST: resize, pad, crop and flip one sample.

    Images without a canonical orientation, such as aerial images or tissue, can also be rotated and flipped vertically,
    which is not part of the paper.

    The long side is drawn as an integer, uniformly from ``int(base_size * scale[0])`` to
    ``int(base_size * scale[1])`` inclusive, and the aspect ratio is kept. The image is resized
    bilinearly with antialiasing, as in PIL to within 1/255, the mask by nearest neighbor, exactly as in PIL. Images
    smaller than the crop are padded on the right and at the bottom: the image with 0, the mask with
    ``ignore_index``. Draws come from torch's global CPU generator, so ``torch.manual_seed`` (and a data loader's
    seeds) reproduce them.

    Args:
        crop_size: side of the square crop, or ``(height, width)``, in pixels.
        base_size: long side that ``scale`` multiplies, in pixels; ``None`` takes each image's own.
        scale: smallest and largest factor.
        flip: probability of a horizontal flip.
        ignore_index: mask value of the padding.
        vertical_flip: probability of a vertical flip.
        quarter_turns: whether to rotate the image by 0, 90, 180 or 270 degrees with equal probability before
            resizing.

    Shape:
        Image, ``(C, H, W)`` uint8 or float in [0, 1] or PIL, and mask, integer ``(H, W)`` or PIL -> image
        ``(C, *crop_size)``, uint8 or float32, and mask ``(*crop_size)``: uint8 if the input mask is uint8 and
        ``ignore_index`` fits, else int32.

    Raises:
        ValueError: if a setting is out of its range.
        DataError: when called, if image and mask differ in size or have an invalid shape.

    Example:
        >>> weak = WeakAugment(4, base_size=8)
        >>> image, mask = weak(torch.rand(3, 6, 9), torch.zeros(6, 9, dtype=torch.uint8))
        >>> image.shape, mask.shape
        (torch.Size([3, 4, 4]), torch.Size([4, 4]))
    """

    crop_size: int | tuple[int, int]
    _: KW_ONLY
    base_size: int | None = None
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    ignore_index: int = 255
    vertical_flip: float = 0.0
    quarter_turns: bool = False

    def __post_init__(self) -> None:
        size = tuple(self.crop_size) if isinstance(self.crop_size, (tuple, list)) else (self.crop_size,) * 2
        if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
            raise ValueError(f"crop_size is {self.crop_size!r}; expected a positive integer or (height, width)")
        object.__setattr__(self, "crop_size", size)
        if self.base_size is not None and not (isinstance(self.base_size, int) and self.base_size > 0):
            raise ValueError(f"base_size is {self.base_size}; expected a positive integer or None")
        object.__setattr__(self, "scale", ordered_range("scale", self.scale, low=0.0))
        check_probability("flip", self.flip)
        check_probability("vertical_flip", self.vertical_flip)
        if not -(2**31) <= self.ignore_index < 2**31:
            raise ValueError(f"ignore_index is {self.ignore_index}; expected an integer of 32 bits")

    def __call__(self, image: ImageLike, mask: MaskLike) -> tuple[Tensor, Tensor]:
        """Augment one image and its mask in the same way."""
        assert isinstance(self.crop_size, tuple)
        pixels, classes = pair_of((image, mask), name="sample")
        if not 0 <= self.ignore_index <= 255:
            classes = classes.to(torch.int32)
        if self.quarter_turns:
            turns = _integer(0, 3)
            pixels, classes = pixels.rot90(turns, (-2, -1)), classes.rot90(turns, (-2, -1))
        height, width = classes.shape
        base = self.base_size or max(height, width)
        low, high = (max(1, int(base * factor)) for factor in self.scale)
        new, old = _integer(low, high), max(height, width)
        # Multiply first: an exact half (201 * 198 / 396) is rounded up, as in the paper's runs.
        height, width = (max(1, int(side * new / old + 0.5)) for side in (height, width))
        pixels = _bilinear(pixels, height, width)
        classes = classes[_nearest(classes.shape[0], height)][:, _nearest(classes.shape[1], width)]

        crop_height, crop_width = self.crop_size
        padding = (0, max(0, crop_width - width), 0, max(0, crop_height - height))
        pixels, classes = F.pad(pixels, padding), F.pad(classes, padding, value=self.ignore_index)
        top = _integer(0, classes.shape[0] - crop_height)
        left = _integer(0, classes.shape[1] - crop_width)
        window = (..., slice(top, top + crop_height), slice(left, left + crop_width))
        mirrored = [-1] if torch.rand((), device="cpu") < self.flip else []
        if self.vertical_flip > 0 and torch.rand((), device="cpu") < self.vertical_flip:
            mirrored.append(-2)
        # A flip copies even along no axis: the result must not alias the data set or keep the whole image alive.
        pixels, classes = (x[window].flip(mirrored) for x in (pixels, classes))
        return pixels.contiguous(), classes.contiguous()


def _bilinear(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize with antialiasing, as PIL does to within 1/255."""
    if width > 1:
        resized: Tensor = vision.resize(pixels, [height, width], antialias=True)
        return resized
    # If the result is one pixel wide, torch blurs floats and raises on uint8; one pixel high is correct.
    turned = pixels[:, None].mT.clone(memory_format=torch.contiguous_format)
    resized = vision.resize(turned, [width, height], antialias=True)
    return resized.mT[:, 0]


def _nearest(old: int, new: int) -> Tensor:
    """Return the index of the nearest old pixel for each new one, rounded as in PIL."""
    step = torch.full((new,), old / new, dtype=torch.float64, device="cpu")
    step[0] *= 0.5
    return step.cumsum(0).long().clamp_(max=old - 1)


def _integer(low: int, high: int) -> int:
    """Draw uniformly from ``low`` to ``high`` inclusive with the global CPU generator."""
    return int(torch.randint(low, high + 1, (), device="cpu"))
