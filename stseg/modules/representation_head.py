"""Heads beside the classifier."""

from __future__ import annotations

from torch import nn

from stseg.checks import check_probability


def representation_head(channels: int, width: int = 256, *, dropout: float = 0.1) -> nn.Sequential:
    """Build the representation head of U2PL (Wang et al., CVPR 2022): features whose classes are to lie apart.

    Two 3x3 convolutions with batch normalization, ReLU and dropout of channels, then a 1x1 convolution.

    Args:
        channels: channels of the features that it is given.
        width: channels of the convolutions and of the result.
        dropout: probability that a channel is dropped.

    Raises:
        ValueError: if ``dropout`` is not in [0, 1].

    Example:
        >>> sum(p.numel() for p in representation_head(512).parameters())
        1836800
    """
    check_probability("dropout", dropout)
    layers: list[nn.Module] = []
    for given in (channels, width):
        layers += [nn.Conv2d(given, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout2d(dropout)]
    return nn.Sequential(*layers, nn.Conv2d(width, width, 1))
