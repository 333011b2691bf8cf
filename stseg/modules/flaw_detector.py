"""Detector of flaws in predictions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = 128  # of less than 92 the strides leave a single value


class FlawDetector(nn.Module):
    """Fully convolutional network that finds the flaws of a prediction, that of GCT (Ke et al., ECCV 2020).

    Eight 4x4 convolutions with padding 1: ``width`` channels and stride 2; 2, 4 and 8 times as many, each with stride
    2 and again with stride 1; one channel with stride 2. Between them half of the channels pass batch normalization
    and half instance normalization, then leaky ReLUs of slope 0.2. Flaws are resized to the image: bilinear, corners
    aligned. Sides below 128 are enlarged to 128 before, as the strides leave a single value of less than 92.

    Args:
        in_channels: channels of the images and of the prediction together.
        width: channels of the first convolution.

    Shape:
        Images ``(B, C, H, W)`` and probabilities ``(B, K, H, W)`` -> ``(B, 1, H, W)``, not limited to [0, 1].

    Raises:
        ValueError: when called, if images and probabilities do not have ``in_channels`` channels together.

    Example:
        >>> detector = FlawDetector(3 + 21)
        >>> sum(p.numel() for p in detector.parameters())
        8294017
        >>> detector(torch.zeros(2, 3, 65, 97), torch.zeros(2, 21, 65, 97)).shape
        torch.Size([2, 1, 65, 97])
    """

    def __init__(self, in_channels: int, width: int = 64) -> None:
        super().__init__()
        self.in_channels = in_channels
        layers: list[nn.Module] = []
        for times, stride in ((1, 2), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1)):
            out_channels = times * width
            layers += [
                nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1),
                InstanceBatchNorm(out_channels),
                nn.LeakyReLU(0.2),
            ]
            in_channels = out_channels
        self.layers = nn.Sequential(*layers, nn.Conv2d(in_channels, 1, 4, stride=2, padding=1))

    def forward(self, images: Tensor, probabilities: Tensor) -> Tensor:
        """Compute the flaws ``(B, 1, H, W)`` of a prediction."""
        if images.shape[1] + probabilities.shape[1] != self.in_channels:
            raise ValueError(
                f"images have {images.shape[1]} channels and probabilities {probabilities.shape[1]}; the detector "
                f"expects {self.in_channels} together: FlawDetector({images.shape[1] + probabilities.shape[1]})"
            )
        height, width = images.shape[-2:]
        both = torch.cat([images, probabilities], 1)
        if min(height, width) < _LEAST:
            size = max(height, _LEAST), max(width, _LEAST)
            both = F.interpolate(both, size=size, mode="bilinear", align_corners=True)
        return F.interpolate(self.layers(both), size=(height, width), mode="bilinear", align_corners=True)


class InstanceBatchNorm(nn.Module):
    """Batch normalization of the first half of the channels, instance normalization without weights of the others."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.batch, self.instance = nn.BatchNorm2d(channels - channels // 2), nn.InstanceNorm2d(channels // 2)

    def forward(self, maps: Tensor) -> Tensor:
        """Normalize maps ``(B, channels, H, W)``."""
        first, second = maps[:, : self.batch.num_features], maps[:, self.batch.num_features :]
        return torch.cat([self.batch(first), self.instance(second)], 1)
