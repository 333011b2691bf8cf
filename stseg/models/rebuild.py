"""Networks as records: which can be made again from what they say about themselves."""

from __future__ import annotations

import json
import sys
from typing import Any

from torch import nn

from stseg.models.segmenter import Segmenter


def describe_network(model: nn.Module) -> dict[str, Any] | None:
    """Return the class and arguments of a network of segmentation_models_pytorch, and the settings of its wrapper.

    None for other networks, and for those with settings that are functions.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> network = smp.Unet("resnet18", encoder_weights=None, classes=3)
        >>> describe_network(Segmenter(network))["class"], describe_network(nn.Conv2d(3, 3, 1))
        ('Unet', None)
    """
    if not isinstance(model, Segmenter) or callable(model.select):
        return None
    kind, arguments = type(model.network), getattr(model.network, "_hub_mixin_config", None)
    smp = sys.modules.get("segmentation_models_pytorch")  # imported by whoever made a network of it
    if getattr(smp, kind.__name__, None) is not kind or not isinstance(arguments, dict):
        return None
    wrapper = {"mean": model.mean, "std": model.std, "stride": model.stride, "select": model.select}
    try:
        # Weights to start from are not needed: the trained ones come from the file.
        found = {"class": kind.__name__, "arguments": {**arguments, "encoder_weights": None}, "segmenter": wrapper}
        read: dict[str, Any] = json.loads(json.dumps(found, allow_nan=False))
    except (TypeError, ValueError):
        return None
    return read


def make_network(record: dict[str, Any]) -> Segmenter:
    """Make a network again from its record, with random weights.

    Example:
        >>> import segmentation_models_pytorch as smp
        >>> record = describe_network(Segmenter(smp.Unet("resnet18", encoder_weights=None, classes=3)))
        >>> type(make_network(record).network).__name__
        'Unet'
    """
    import segmentation_models_pytorch as smp

    return Segmenter(getattr(smp, record["class"])(**record["arguments"]), **record["segmenter"])
