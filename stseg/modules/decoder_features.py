"""Features from which the last layer of a network makes the logits."""

from __future__ import annotations

from torch import Tensor, nn

from stseg.errors import NetworkError
from stseg.models.segmenter import Segmenter
from stseg.modules.features import captured


def decoder_of(model: nn.Module, name: str | None = None) -> nn.Module:
    """Find the submodule that returns the features from which the last layer makes the logits.

    Args:
        model: a network, bare or in a :class:`stseg.Segmenter`.
        name: dotted name of the submodule of the network; None tries ``decoder``, as in segmentation_models_pytorch,
            and ``fuse``, as in :class:`stseg.models.DeepLabV3Plus`.

    Raises:
        NetworkError: if there is no such submodule.

    Example:
        >>> network = nn.ModuleDict({"decoder": nn.Conv2d(3, 8, 1), "head": nn.Conv2d(8, 2, 1)})
        >>> decoder_of(network) is network["decoder"], decoder_of(network, "head") is network["head"]
        (True, True)
    """
    network: nn.Module = model.network if isinstance(model, Segmenter) else model
    submodules = dict(network.named_modules())
    for candidate in ("decoder", "fuse") if name is None else (name,):
        if candidate in submodules:
            found: nn.Module = submodules[candidate]
            return found
    missing = "decoder" if name is None else f"submodule {name!r}"
    raise NetworkError(
        f"the network ({type(network).__name__}) has no {missing}; expected the dotted name of the submodule that "
        f"returns the features of the last layer, among {[each for each, _ in network.named_children()]} or within"
    )


def logits_and_features(
    model: nn.Module, images: Tensor, *, channels: int, features: str | None = None
) -> tuple[Tensor, Tensor]:
    """Run a network, and return the features from which its last layer makes the logits too.

    Args:
        model: a wrapped network.
        images: ``(B, C, H, W)``.
        channels: channels of the features.
        features: dotted name of the submodule that returns them; None finds it by :func:`decoder_of`.

    Returns:
        Logits ``(B, K, H, W)`` and features ``(B, channels, h, w)``. Where the model pads the images, the cells that
        show the padding alone are cut off the features.

    Raises:
        TypeError: if the model is not wrapped.
        NetworkError: if the network has no such submodule, or it does not return maps of ``channels`` channels.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 2, 1))
        >>> logits, features = logits_and_features(Segmenter(network), torch.rand(1, 3, 9, 8), channels=8, features="0")
        >>> logits.shape, features.shape
        (torch.Size([1, 2, 9, 8]), torch.Size([1, 8, 5, 4]))
    """
    if not isinstance(model, Segmenter):
        raise TypeError(f"the model is {type(model).__name__}; expected stseg.Segmenter(network)")
    module, seen = decoder_of(model, features), []
    handle = model.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0].shape[-2:]))
    try:
        with captured(module) as outputs:
            logits: Tensor = model(images)
    finally:
        handle.remove()
    found = outputs[-1] if outputs else None
    if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[:2] != (len(images), channels):
        came = f"a map of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise NetworkError(
            f"the {type(module).__name__} of the network ({type(model.network).__name__}) returned {came} for "
            f"{len(images)} images; expected a map of {channels} channels: give "
            "its number as channels=, or name another submodule as features="
        )
    rows, columns = (-(-s * f // p) for s, f, p in zip(images.shape[-2:], found.shape[-2:], seen[-1], strict=True))
    return logits, found[..., :rows, :columns]
