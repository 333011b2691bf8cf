"""Parts shared by the networks of the paper: dilated backbone, convolution blocks, resizing."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def dilated_backbone(name: str, *, in_channels: int, pretrained: bool) -> nn.Module:
    """Build a timm backbone that returns feature levels, dilated to an output stride of 8.

    In a ResNet this dilates stages 3 and 4, with dilations 2 and 4; the first block of each keeps the dilation of
    the stage before it, as in the paper.

    Raises:
        RuntimeError: if timm has no such model.
        ValueError: if the model has no feature levels, or no output stride of 8.
    """
    import timm  # slow to import, and rarely needed

    try:
        backbone: nn.Module = timm.create_model(
            name, features_only=True, output_stride=8, in_chans=in_channels, pretrained=pretrained
        )
    except (TypeError, AssertionError) as error:  # for options that a model does not know
        raise ValueError(
            f"backbone {name!r} has no output stride of 8 in timm; ResNets, RegNets, EfficientNets, "
            "MobileNets and ConvNeXts have"
        ) from error
    return backbone


def feature_levels(backbone: nn.Module) -> tuple[list[int], list[int]]:
    """Return channels and strides of the levels of a timm backbone."""
    info: Any = backbone.feature_info
    return info.channels(), info.reduction()


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> nn.Sequential:
    """Build a size-preserving convolution without bias, batch normalization and ReLU."""
    padding = dilation * (kernel_size // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def resize_as(x: Tensor, other: Tensor) -> Tensor:
    """Resize ``x`` to the height and width of ``other``: bilinear, corners aligned."""
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear", align_corners=True)
