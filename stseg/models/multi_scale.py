"""Test-time augmentation over scales and horizontal flips."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.errors import NetworkError
from stseg.models.batching import images_per_pass
from stseg.models.segmenter import as_segmenter
from stseg.models.symbolic import is_traced


class MultiScaleFlip(nn.Module):
    """Test-time augmentation that averages the probabilities over scales and horizontal flips.

    The labeling of the paper (Yang et al., CVPR 2022): sides ``int(h * s)`` and ``int(w * s)``, softmax for each
    view, resized back (bilinear, corners aligned), averaged. With the defaults these are 10 views.

    Args:
        model: a network or a wrapped one; a bare network is wrapped in :class:`stseg.Segmenter`.
        scales: factors of height and width.
        flip: whether to add the horizontal flip of every view.

    Shape:
        ``(B, C, H, W)`` uint8 or float in [0, 1] -> ``(B, K, H, W)`` log of the mean probability; its softmax is
        the mean probability again, so this can replace the model.

    Raises:
        ValueError: if ``scales`` is empty or has a value that is not positive.

    Example:
        >>> model = MultiScaleFlip(nn.Conv2d(3, 4, 1), scales=(0.5, 1.0))
        >>> model(torch.rand(2, 3, 30, 41)).exp().sum(1).allclose(torch.ones(2, 30, 41))
        True
    """

    takes_images = True

    def __init__(
        self, model: nn.Module, scales: Sequence[float] = (0.5, 0.75, 1.0, 1.5, 2.0), flip: bool = True
    ) -> None:
        super().__init__()
        self.scales = tuple(float(s) for s in scales)
        if not self.scales or not all(0 < s < math.inf for s in self.scales):
            raise ValueError(f"scales are {self.scales}; expected one or more positive factors")
        self.model = as_segmenter(model)
        self.flip = flip

    def forward(self, images: Tensor) -> Tensor:
        """Compute the log of the mean probability ``(B, K, H, W)`` of images ``(B, C, H, W)``."""
        if images.dtype == torch.uint8:
            images = images.float() / 255
        height, width = images.shape[-2:]
        if is_traced() and not type(height) is type(width) is int:
            raise NetworkError(
                "MultiScaleFlip computes the sizes of its views from that of the images, and cannot be exported for "
                "several sizes; expected the network inside, its attribute model"
            )
        total: Tensor | float = 0.0
        for scale in self.scales:
            size = (max(1, int(height * scale)), max(1, int(width * scale)))
            view = images if size == (height, width) else _resize(images, size)
            count, most = len(view), len(view)
            if self.flip:
                # On a CPU, where small images gain by it, a view and its mirror image are computed together.
                most = 2 * most if view.device.type == "cpu" else most
                view = torch.cat([view, view.flip(-1)])
            parts = torch.split(view, images_per_pass(view.device, *size, most))
            probability = torch.cat([_resize(softmax_of_classes(self.model(part)), (height, width)) for part in parts])
            total = total + probability[:count]
            if self.flip:
                total = total + probability[count:].flip(-1)
        assert isinstance(total, Tensor)
        mean = total / (len(self.scales) * (2 if self.flip else 1))
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"scales={self.scales}, flip={self.flip}"


def softmax_of_classes(logits: Tensor) -> Tensor:
    """Compute the softmax over the classes along the memory: torch first copies the values where it is another way."""
    if logits.stride(1) == 1:
        return logits.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2)
    return logits.softmax(1)


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=True)
