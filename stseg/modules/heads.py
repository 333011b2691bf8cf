"""Heads beside a network: decoders and classifiers that are used in training only."""

from __future__ import annotations

from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn


class PixelShuffleDecoder(nn.Sequential):
    """Decoder of 1x1 convolutions and pixel shuffles: the main and auxiliary decoders of CCT (Ouali et al., CVPR 2020).

    A 1x1 convolution to the classes, then, for every doubling of the sides, one to four times as many channels, a
    ReLU and a pixel shuffle. The convolutions before a shuffle start with equal weights for the four pixels (ICNR,
    Aitken et al., 2017) and biases of 0, so that there is no checkerboard at the beginning. Unlike in the authors' code
    there is no ReLU before the last shuffle: with it no logit is negative, and the gradient of a pixel all of whose
    logits are 0 is lost, which with few classes is a whole decoder now and then.

    Args:
        in_channels: channels of the features.
        num_classes: channels of the logits.
        upsampling: factor of the sides, a power of 2.

    Shape:
        ``(B, in_channels, h, w)`` -> ``(B, num_classes, upsampling * h, upsampling * w)``

    Raises:
        ValueError: if ``upsampling`` is not a power of 2.

    Example:
        >>> decoder = PixelShuffleDecoder(512, 21)
        >>> sum(p.numel() for p in decoder.parameters())
        16296
        >>> decoder(torch.rand(1, 512, 5, 6)).shape
        torch.Size([1, 21, 40, 48])
    """

    def __init__(self, in_channels: int, num_classes: int, upsampling: int = 8) -> None:
        if upsampling < 1 or upsampling & (upsampling - 1):
            raise ValueError(f"upsampling is {upsampling}; expected a power of 2")
        first = nn.Conv2d(in_channels, num_classes, kernel_size=1, bias=False)
        nn.init.kaiming_normal_(first.weight)
        layers: list[nn.Module] = [first]
        for _ in range(upsampling.bit_length() - 1):
            layer = nn.Conv2d(num_classes, 4 * num_classes, kernel_size=1)
            one = nn.init.kaiming_normal_(torch.empty(num_classes, num_classes, 1, 1))
            with torch.no_grad():
                layer.weight.copy_(one.repeat_interleave(4, dim=0))
            nn.init.zeros_(cast("Tensor", layer.bias))
            layers += [layer, nn.ReLU(), nn.PixelShuffle(2)]
        if upsampling > 1:
            del layers[-2]
        super().__init__(*layers)


class RotationHead(nn.Module):
    """Classifier of the rotation of an image from its logits, as in S4L for segmentation (PixelSSL, 2020).

    Two 4x4 convolutions of stride 2, to as many and to twice as many channels, each with batch normalization and a
    leaky ReLU of slope 0.2; the mean over all positions; a linear layer to four scores.

    Args:
        in_channels: channels of the maps, such as the number of classes.

    Shape:
        ``(B, in_channels, H, W)`` -> ``(B, 4)``; H and W at least 4.

    Example:
        >>> head = RotationHead(21)
        >>> sum(p.numel() for p in head.parameters())
        21529
        >>> head(torch.rand(2, 21, 33, 33)).shape
        torch.Size([2, 4])
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        widths = (in_channels, in_channels, 2 * in_channels)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1], 4)

    def forward(self, maps: Tensor) -> Tensor:
        """Compute the scores of 0, 90, 180 and 270 degrees."""
        scores: Tensor = self.classifier(self.layers(maps).mean((2, 3)))
        return scores
