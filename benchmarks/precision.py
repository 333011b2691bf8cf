"""Precision of single layers of the benchmarks' networks."""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn


def keep_depthwise_in_float32(network: nn.Module) -> None:
    """Take depthwise convolutions out of autocast.

    The bfloat16 backward passes of strided ones and of those of 5 x 5 take two to eight times as long as the float32
    ones on a CPU; a step of a U-Net with the lite0 encoder, 30 % longer.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            module.forward = MethodType(_forward_in_float32, module)  # type: ignore[method-assign]


def _forward_in_float32(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        result: Tensor = type(convolution).forward(convolution, images.float())
        return result
