"""Flaw detector of GCT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = 64  # sides that the strides leave something of


class FlawDetector(nn.Module):
    """Network that sees an image and a prediction, and says where the prediction is wrong (GCT, Ke et al., ECCV 2020).

    Eight 4x4 convolutions with 64, 128, 128, 256, 256, 512, 512 and 1 channels, of stride 2 but for the third, fifth
    and seventh; half-batch, half-instance normalization and leaky ReLUs of slope 0.2 between them; the result is
    resized to the image: bilinear, corners aligned. Maps with a side below 64 are padded to 64 on the right and at the
    bottom by repeating the border.

    Args:
        in_channels: channels of image and prediction together.
        width: channels of the first convolution, of which the others are multiples; even.

    Shape:
        ``(B, in_channels, H, W)`` -> ``(B, H, W)``.

    Example:
        >>> detector = FlawDetector(3 + 21)
        >>> sum(p.numel() for p in detector.parameters())
        8294017
        >>> detector(torch.zeros(2, 24, 70, 40)).shape
        torch.Size([2, 70, 40])
    """

    def __init__(self, in_channels: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for times, stride in ((1, 2), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1)):
            channels = times * width
            layers += [nn.Conv2d(in_channels, channels, 4, stride=stride, padding=1)]
            layers += [HalfNorm(channels), nn.LeakyReLU(0.2)]
            in_channels = channels
        self.layers = nn.Sequential(*layers, nn.Conv2d(in_channels, 1, 4, stride=2, padding=1))

    def forward(self, maps: Tensor) -> Tensor:
        """Compute flaw maps, which may be negative."""
        height, width = maps.shape[-2:]
        bottom, right = max(0, _LEAST - height), max(0, _LEAST - width)
        padded = F.pad(maps, (0, right, 0, bottom), mode="replicate") if bottom or right else maps
        flaws = F.interpolate(self.layers(padded), size=padded.shape[-2:], mode="bilinear", align_corners=True)
        return flaws[:, 0, :height, :width]


class HalfNorm(nn.Module):
    """Batch normalization of the first half of the channels, instance normalization of the second.

    Example:
        >>> HalfNorm(4)(torch.rand(2, 4, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.batch = nn.BatchNorm2d(channels // 2)
        self.instance = nn.InstanceNorm2d(channels - channels // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``(B, C, H, W)``."""
        half = self.batch.num_features
        return torch.cat([self.batch(x[:, :half]), self.instance(x[:, half:])], 1)
