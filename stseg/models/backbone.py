"""Lookup of the backbone of a network."""

from __future__ import annotations

from torch import nn

from stseg.models.state import bare_network


def backbone_of(network: nn.Module, name: str | None = None, *, argument: str = "backbone") -> nn.Module | None:
    """Find the submodule that turns images into features.

    Args:
        network: any network, not in a :class:`stseg.Segmenter`; that inside ``torch.compile`` and ``DataParallel``
            counts.
        name: dotted name of the submodule; None tries ``encoder``, ``backbone``, and the one that
            ``base_model_prefix`` names (Hugging Face), and those of the only child of a network that has none of them.
        argument: what the caller calls ``name``, for the message.

    Returns:
        The submodule; None if ``name`` is None and none is found.

    Raises:
        ValueError: if the network has no submodule called ``name``.

    Example:
        >>> network = nn.ModuleDict({"backbone": nn.Conv2d(3, 8, 1), "head": nn.Conv2d(8, 2, 1)})
        >>> backbone_of(network), backbone_of(network["head"])
        (Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1)), None)
    """
    network = bare_network(network)
    if name is not None:
        try:
            return network.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{argument} is {name!r}; the network ({type(network).__name__}) has no such submodule"
            ) from None
    names = ("encoder", "backbone", getattr(network, "base_model_prefix", None) or "encoder")
    found = (getattr(network, name, None) for name in names)
    backbone = next((module for module in found if isinstance(module, nn.Module)), None)
    children = [child for child in network.children() if next(child.parameters(), None) is not None]
    return backbone_of(children[0]) if backbone is None and len(children) == 1 else backbone
