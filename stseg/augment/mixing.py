"""CutMix: a rectangle of another image of the batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Generator, Tensor

from stseg.augment._boxes import draw_boxes
from stseg.augment._settings import check_images, ordered_range
from stseg.checks import check_probability
from stseg.functional.mixing import box_mask, paste


@dataclass(frozen=True)
class CutMix:
    """CutMix: paste a rectangle of another image of the batch into each image, and into its masks or maps.

    As UniMatch draws it (Yang et al., CVPR 2023): a rectangle covers a share ``area`` of the image, drawn once and
    uniformly; the height / width ratio ``ratio``, uniform, and the upper left corner, uniform over the image, are
    redrawn until the rectangle lies inside. If none fits within 256 draws, the image is left unchanged.
    (:class:`stseg.Cutout` redraws the area as well, which favors small rectangles.)

    Image i gets its rectangle from image B - 1 - i, so the middle image of an odd batch is mixed with itself.

    Args:
        p: probability that an image gets a rectangle.
        area: smallest and largest share of the image, in (0, 1].
        ratio: smallest and largest height / width.

    Shape:
        Any number of tensors ``(B, C, H, W)`` or ``(B, H, W)``, the first one ``(B, C, H, W)`` -> as many tensors of
        the same shapes and dtypes. The input is not modified.

    Raises:
        ValueError: if a setting is out of its range; when called, if the shapes do not match.

    Example:
        >>> import torch
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.tensor([0, 1])[:, None, None].expand(2, 32, 32)
        >>> new_images, new_masks = CutMix(p=1.0)(images, masks)
        >>> pasted = (new_masks != masks)[:, None]
        >>> bool((new_images == torch.where(pasted, images.flip(0), images)).all())
        True
    """

    p: float = 0.5
    area: tuple[float, float] = (0.02, 0.4)
    ratio: tuple[float, float] = (0.3, 1 / 0.3)

    def __post_init__(self) -> None:
        check_probability("p", self.p)
        object.__setattr__(self, "area", ordered_range("area", self.area, low=0.0, high=1.0))
        object.__setattr__(self, "ratio", ordered_range("ratio", self.ratio, low=0.0))

    def __call__(self, *tensors: Tensor, generator: Generator | None = None) -> tuple[Tensor, ...]:
        """Draw rectangles for the first tensor and mix all tensors in the same way."""
        check_images(tensors)
        return self.transform(self.draw(tensors[0], generator), *tensors)

    def draw(self, images: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw for images ``(B, C, H, W)``, from ``generator`` or the default one of the device.

        Returns:
            Rectangles ``(B, 4)`` int64, half-open: top, left, bottom, right, all 0 for none.
        """
        return draw_boxes(images, p=self.p, area=self.area, ratio=self.ratio, areas=1, generator=generator)

    def transform(self, boxes: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Paste the rectangles of the reversed batch; deterministic."""
        return tuple(paste(box_mask(boxes, *tensor.shape[-2:]), tensor, tensor.flip(0)) for tensor in tensors)
