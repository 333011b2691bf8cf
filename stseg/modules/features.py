"""Access to the features inside a network without changing its code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.errors import NetworkError
from stseg.models.backbone import backbone_of
from stseg.models.segmenter import Segmenter


@contextmanager
def captured(module: nn.Module) -> Iterator[list[Any]]:
    """Collect the outputs of a module.

    Args:
        module: any submodule of a network.

    Yields:
        A list to which the output of each call is appended.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
        >>> with captured(network[1]) as features:
        ...     logits = network(torch.zeros(1, 3, 4, 4))
        >>> features[0].shape
        torch.Size([1, 8, 4, 4])
    """
    outputs: list[Any] = []
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


@contextmanager
def rewritten(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the output of a module by a function of it.

    Args:
        module: any submodule of a network.
        change: from the output to its replacement.

    Raises:
        TypeError: when the module is called, if ``change`` returns None.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1, bias=False))
        >>> with rewritten(network[0], torch.zeros_like):
        ...     print(network(torch.rand(1, 3, 4, 4)).abs().max().item())
        0.0
    """

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        changed = change(output)
        if changed is None:  # which torch takes as "no change"
            raise TypeError(f"{change!r} returned None; expected the new output")
        return changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def map_features(change: Callable[[Tensor], Any], features: Any) -> Any:
    """Apply a function to every tensor in the output of a backbone.

    Args:
        change: from a tensor to its replacement.
        features: a tensor, or possibly nested lists, tuples, named tuples or mappings of tensors.

    Returns:
        The same structure; other values are kept.

    Example:
        >>> map_features(lambda x: tuple(x.shape), {"out": torch.zeros(1, 8, 4, 4), "levels": [torch.zeros(1, 2)]})
        {'out': (1, 8, 4, 4), 'levels': [(1, 2)]}
    """
    if isinstance(features, Tensor):
        return change(features)
    if isinstance(features, Mapping):
        changed: Any = copy.copy(features)  # of its own type: those of Hugging Face keep items as attributes too
        for key, value in features.items():
            changed[key] = map_features(change, value)
        return changed
    if isinstance(features, tuple) and hasattr(features, "_make"):
        return features._make(map_features(change, value) for value in features)
    if isinstance(features, (list, tuple)):
        return type(features)(map_features(change, value) for value in features)
    return features


def channel_dropout(features: Tensor, p: float) -> Tensor:
    """Zero whole channels at random, independently per image, and scale the others by ``1 / (1 - p)``.

    Args:
        features: maps ``(B, C, H, W)``, tokens ``(B, N, C)``, which share the dropped channels, or vectors
            ``(B, C)``.
        p: probability that a channel of an image is zeroed, from 0 to 1.

    Returns:
        New features of the same shape.

    Raises:
        ValueError: if the features have any other number of dimensions, or ``p`` is not in [0, 1].

    Example:
        >>> dropped = channel_dropout(torch.ones(1, 100, 2, 2), p=0.5)
        >>> sorted({*dropped.flatten().tolist()}), sorted({*dropped.sum((2, 3)).flatten().tolist()})
        ([0.0, 2.0], [0.0, 8.0])
    """
    if p == 0 and features.ndim in (2, 3, 4):
        return features.clone()  # torch returns the features themselves
    if features.ndim == 4:
        return F.dropout2d(features, p)
    if features.ndim == 3:
        return F.dropout1d(features.mT, p).mT
    if features.ndim == 2:
        return F.dropout(features, p)
    raise ValueError(
        f"features have shape {tuple(features.shape)}; expected maps (B, C, H, W), tokens (B, N, C) or vectors (B, C)"
    )


def complementary_dropout(features: Tensor, factor: Tensor) -> Tensor:
    """Scale the channels of two views of a batch by complementary factors, as UniMatch V2 does.

    Args:
        features: maps ``(2B, C, H, W)``, tokens ``(2B, N, C)`` or vectors ``(2B, C)``: the first view of B images, then
            the second one.
        factor: ``(B, C)`` from :func:`complementary_factor`: the first view is multiplied by it, the second by
            ``2 - factor``.

    Returns:
        New features of the same shape.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> factor = torch.tensor([[0.0, 2.0, 1.0]])
        >>> complementary_dropout(torch.ones(2, 3), factor)
        tensor([[0., 2., 1.],
                [2., 0., 1.]])
    """
    factors = torch.cat([factor, 2 - factor]).to(features.dtype)
    channels_last = features.ndim == 3
    if features.ndim not in (2, 3, 4) or features.shape[:: 2 if channels_last else 1][:2] != factors.shape:
        raise ValueError(
            f"features have shape {tuple(features.shape)} and factor {tuple(factor.shape)}; expected (2B, C, H, W), "
            "(2B, N, C) or (2B, C), and (B, C)"
        )
    if channels_last:
        return features * factors[:, None]
    return features * factors.reshape(*factors.shape, *[1] * (features.ndim - 2))


def complementary_factor(
    images: int, channels: int, untouched: Tensor, *, device: torch.device | None = None
) -> Tensor:
    """Draw factors for :func:`complementary_dropout`: 0 or 2 for each channel of an image with equal probability.

    Args:
        images: number of images B.
        channels: number of channels C.
        untouched: indices of images whose factors are 1.
        device: device of the factors.

    Returns:
        ``(B, C)`` float32.

    Example:
        >>> factor = complementary_factor(3, 100, torch.tensor([1]))
        >>> factor[1].unique(), factor[[0, 2]].unique()
        (tensor([1.]), tensor([0., 2.]))
    """
    factor = 2 * torch.randint(2, (images, channels), device=device).float()
    factor[untouched] = 1.0
    return factor


@contextmanager
def changed_features(
    model: nn.Module, change: Callable[[Tensor], Tensor], *, backbone: str | None = None
) -> Iterator[None]:
    """Run the decoder of a network on changed features.

    Inside, every feature ``f`` of the backbone becomes ``change(f)``, of the same shape. If a backbone returns the
    image among its features, it is passed on.

    Args:
        model: a wrapped network.
        change: from features to features of the same shape. It is called once for each tensor that the backbone
            returns.
        backbone: dotted name of the submodule that returns the features; None finds it by
            :func:`stseg.models.backbone_of`.

    Raises:
        TypeError, NetworkError, ValueError: as :func:`perturbed_features`.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1, bias=False))
        >>> model = Segmenter(network)
        >>> with changed_features(model, torch.zeros_like, backbone="0"):
        ...     print(model(torch.rand(1, 3, 8, 8)).abs().max().item())
        0.0
    """
    with _hooked(model, change, backbone):
        yield


@contextmanager
def perturbed_features(
    model: nn.Module, perturb: Callable[[Tensor], Tensor], *, backbone: str | None = None
) -> Iterator[None]:
    """Run the decoder of a network on clean and perturbed features in one batch.

    Inside, every feature ``f`` of the backbone becomes ``torch.cat([f, perturb(f)])``, and the model returns two rows
    of logits for each image: first all clean ones, then all perturbed ones. The backbone runs once, and batch
    normalization in the decoder sees both halves together, as in UniMatch (Yang et al., CVPR 2023, section 3.2). If a
    backbone returns the image among its features, it is repeated, not perturbed.

    Args:
        model: a wrapped network.
        perturb: from features to features of the same shape, such as ``functools.partial(channel_dropout, p=0.5)``. It
            is called once for each tensor that the backbone returns.
        backbone: dotted name of the submodule that returns the features; None finds it by
            :func:`stseg.models.backbone_of`.

    Raises:
        TypeError: if the model is not wrapped.
        NetworkError: if no backbone is found; when the model is called, if the backbone does not return
            features with a row for each image, or the network does not return two rows of logits for each.
        ValueError: if the network has no submodule called ``backbone``.

    Example:
        >>> from functools import partial
        >>> network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
        >>> model = Segmenter(network)
        >>> with perturbed_features(model, partial(channel_dropout, p=0.5), backbone="0"):
        ...     clean, dropped = model(torch.rand(4, 3, 16, 16)).chunk(2)
        >>> clean.shape, dropped.shape
        (torch.Size([4, 2, 16, 16]), torch.Size([4, 2, 16, 16]))
    """
    with _hooked(model, lambda feature: torch.cat([feature, perturb(feature)]), backbone, twice=True):
        yield


@contextmanager
def _hooked(
    model: nn.Module, change: Callable[[Tensor], Tensor], backbone: str | None, *, twice: bool = False
) -> Iterator[None]:
    """Change the features of a backbone; images among them are passed on, ``twice`` if features get twice the rows."""
    model, module, way_out = _found_backbone(model, backbone, "perturbed_features(model, perturb, backbone={!r})")
    network = type(model.network).__name__

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if model._trying:  # which sizes the network takes
            return output
        images = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        shapes: list[tuple[int, ...]] = []

        def changed(feature: Tensor) -> Tensor:
            if any(feature is image for image in images):
                return torch.cat([feature, feature]) if twice else feature
            return change(feature)

        map_features(lambda feature: shapes.append(tuple(feature.shape)), output)
        rows = len(images[0]) if images else 0
        if not shapes or any(shape[:1] != (rows,) for shape in shapes):
            found = f"tensors of the shapes {shapes}" if shapes else type(output).__name__
            raise NetworkError(
                f"the {type(module).__name__} of the network ({network}) returned {found} for {rows} images; expected "
                f"features with a row for each image; {way_out}"
            )
        return map_features(changed, output)

    before, outer = model._rows_per_image, model._outer
    handle = module.register_forward_hook(hook, with_kwargs=True)
    model._rows_per_image = 2 if twice else before
    model._outer = ()  # hooks do not reach compiled or replicated networks
    try:
        yield
    finally:
        model._rows_per_image, model._outer = before, outer
        handle.remove()


class DeepFeatures(NamedTuple):
    """Deepest features of a network, and the size of what it saw."""

    maps: Tensor
    """``(B, C, h, w)`` floats."""
    size: tuple[int, int]
    """Height and width of the padded images, which the maps cover."""


@contextmanager
def deepest_features(model: nn.Module, *, features: str | None = None) -> Iterator[list[DeepFeatures]]:
    """Collect the last and smallest feature map of a network, for a second decoder beside its own.

    Of the maps that the backbone returns it is the one with the fewest positions; of several, the last.

    Args:
        model: a wrapped network.
        features: dotted name of the submodule that returns the features, such as the one before the last layers of a
            decoder; None finds it by :func:`stseg.models.backbone_of`.

    Yields:
        A list to which :class:`DeepFeatures` are appended at each call of the model. Their maps cover the images that
        the network sees, which the wrapper may have padded on the right and at the bottom.

    Raises:
        TypeError: if the model is not wrapped.
        NetworkError: if no backbone is found; when the model is called, if the backbone does not return maps
            ``(B, C, h, w)``; at the end, if the model was called but not the backbone.
        ValueError: if the network has no submodule called ``features``.

    Example:
        >>> model = Segmenter(nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 2, 1)))
        >>> with deepest_features(model, features="0") as found:
        ...     logits = model(torch.rand(4, 3, 15, 16))
        >>> logits.shape, found[0].maps.shape, found[0].size
        (torch.Size([4, 2, 15, 16]), torch.Size([4, 8, 8, 8]), (16, 16))
    """
    model, module, way_out = _found_backbone(model, features, "features={!r}")
    network = type(model.network).__name__
    found: list[DeepFeatures] = []
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = args[:1]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if model._trying:  # which sizes the network takes
            return
        (images,), tensors = seen, list[Tensor]()
        map_features(tensors.append, output)
        maps = [each for each in tensors if each.ndim == 4 and len(each) == len(images) and each.numel()]
        if not maps:
            raise NetworkError(
                f"the {type(module).__name__} of the network ({network}) returned no map of features "
                f"(B, C, h, w) with a row for each of {len(images)} images; {way_out}"
            )
        deepest = min(reversed(maps), key=lambda each: each.shape[2] * each.shape[3])
        found.append(DeepFeatures(deepest, (images.shape[2], images.shape[3])))

    outer, model._outer = model._outer, ()  # hooks do not reach compiled or replicated networks
    handles = [model.network.register_forward_pre_hook(note), module.register_forward_hook(hook)]
    try:
        yield found
        if seen and not found:
            raise NetworkError(
                f"the {type(module).__name__} of the network ({network}) is not called as a module; {way_out}"
            )
    finally:
        model._outer = outer
        for handle in handles:
            handle.remove()


def _found_backbone(model: nn.Module, name: str | None, call: str) -> tuple[Segmenter, nn.Module, str]:
    """Find the backbone of a wrapped network, and say how to name another one."""
    if not isinstance(model, Segmenter):
        raise TypeError(f"the model is {type(model).__name__}; expected stseg.Segmenter(network)")
    module = backbone_of(model.network, name)
    other = next((name for name, child in model.network.named_modules() if name and child is not module), "name")
    way_out = f"name the submodule that returns them, as in {call.format(other)}"
    if module is None:
        raise NetworkError(
            f"no features are found in the network ({type(model.network).__name__}), as it has no encoder or backbone; "
            f"{way_out}"
        )
    return model, module, way_out
