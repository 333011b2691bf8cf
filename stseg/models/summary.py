"""What a network is, in the words and numbers of a report."""

from __future__ import annotations

from typing import Any

from torch import nn

from stseg.models.backbone import backbone_of
from stseg.models.rebuild import describe_network
from stseg.models.segmenter import Segmenter
from stseg.models.state import bare_network


def summarize_network(model: nn.Module) -> dict[str, Any]:
    """Return class, encoder and number of parameters of a network, JSON-serializable.

    Args:
        model: a network, bare or in a :class:`stseg.Segmenter`.

    Example:
        >>> network = nn.ModuleDict({"backbone": nn.Conv2d(3, 8, 1), "head": nn.Conv2d(8, 2, 1)})
        >>> summarize_network(network)
        {'class': 'ModuleDict', 'encoder': 'Conv2d', 'parameters': 50, 'encoder parameters': 32}
    """
    network = bare_network(model)
    network = bare_network(network.network) if isinstance(network, Segmenter) else network
    encoder = backbone_of(network)
    recorded = describe_network(bare_network(model))
    name = None if recorded is None else recorded["arguments"].get("encoder_name")
    return {
        "class": type(network).__name__,
        "encoder": name or (None if encoder is None else type(encoder).__name__),
        "parameters": _count(network),
        "encoder parameters": None if encoder is None else _count(encoder),
    }


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
