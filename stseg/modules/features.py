"""Access to the features inside a network without changing its code."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.checks import check_probability
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


def complementary_dropout(features: Sequence[Tensor], share: float = 0.5) -> list[Tensor]:
    """Split the channels of images at random between two views of them: each channel is in one view, doubled.

    The feature perturbation of UniMatch V2 (Yang et al., TPAMI 2025). The same images lose no channel in both views.

    Args:
        features: maps ``(2B, C, H, W)``, tokens ``(2B, N, C)`` or vectors ``(2B, C)``, such as the levels of a
            backbone; first the rows of one view, then those of the other. Those of the same number of channels C have
            the same channels split in the same way, those of others independently.
        share: share of the B images whose channels are split, from 0 to 1, rounded up to whole images.

    Returns:
        New features of the same shapes.

    Raises:
        ValueError: if the features have any other number of dimensions or an odd number of rows, or ``share`` is not
            in [0, 1].

    Example:
        >>> (features,) = complementary_dropout([torch.ones(2, 100, 4, 4)], share=1.0)
        >>> sorted({*features.flatten().tolist()}), sorted({*features.sum(0).flatten().tolist()})
        ([0.0, 2.0], [2.0])
    """
    check_probability("share", share)
    shapes = [tuple(feature.shape) for feature in features]
    if any(len(shape) not in (2, 3, 4) or shape[0] % 2 or shape[0] != shapes[0][0] for shape in shapes):
        raise ValueError(
            f"features have the shapes {shapes}; expected maps (2B, C, H, W), tokens (2B, N, C) or vectors (2B, C)"
        )
    if not shapes:
        return []
    images, device = shapes[0][0] // 2, features[0].device
    split = torch.rand(images, device=device).argsort() < math.ceil(images * share)
    factors: dict[int, Tensor] = {}

    def changed(feature: Tensor) -> Tensor:
        channels = feature.shape[-1] if feature.ndim == 3 else feature.shape[1]
        if channels not in factors:
            first = torch.randint(2, (images, channels), device=device) * 2
            first = torch.where(split[:, None], first, 1)
            factors[channels] = torch.cat([first, 2 - first])
        factor = factors[channels].to(feature.dtype)
        return feature * (
            factor[:, None] if feature.ndim == 3 else factor.view(factor.shape + (1,) * (feature.ndim - 2))
        )

    return [changed(feature) for feature in features]


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

    def doubled(output: Any, passed_on: Callable[[Tensor], bool]) -> Any:
        return map_features(lambda f: torch.cat([f, f if passed_on(f) else perturb(f)]), output)

    with _changed_output(model, doubled, backbone, rows_per_image=2):
        yield


@contextmanager
def changed_features(
    model: nn.Module, change: Callable[[list[Tensor]], Sequence[Tensor]], *, backbone: str | None = None
) -> Iterator[None]:
    """Replace the features in a network by a function of them.

    Inside, the decoder of the network sees the result instead of the features of the backbone. If a backbone returns
    the image among its features, it is not changed.

    Args:
        model: a wrapped network.
        change: from all tensors that the backbone returns to as many of the same shapes, such as
            :func:`complementary_dropout`.
        backbone: dotted name of the submodule that returns the features; None finds it by
            :func:`stseg.models.backbone_of`.

    Raises:
        TypeError: if the model is not wrapped.
        NetworkError: if no backbone is found; when the model is called, if the backbone does not return
            features with a row for each image, or is not called as a module.
        ValueError: if the network has no submodule called ``backbone``; when the model is called, if ``change`` returns
            another number of features.

    Example:
        >>> model = Segmenter(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)))
        >>> with changed_features(model, complementary_dropout, backbone="0"):
        ...     one, two = model(torch.rand(4, 3, 16, 16)).chunk(2)
        >>> one.shape
        torch.Size([2, 2, 16, 16])
    """

    def changed(output: Any, passed_on: Callable[[Tensor], bool]) -> Any:
        features: list[Tensor] = []
        map_features(lambda f: None if passed_on(f) else features.append(f), output)
        new = list(change(features))
        if len(new) != len(features):
            raise ValueError(f"{change!r} returned {len(new)} features; expected {len(features)}")
        rest = iter(new)
        return map_features(lambda f: f if passed_on(f) else next(rest), output)

    with _changed_output(model, changed, backbone, rows_per_image=1):
        yield


@contextmanager
def _changed_output(
    model: nn.Module,
    change: Callable[[Any, Callable[[Tensor], bool]], Any],
    backbone: str | None,
    *,
    rows_per_image: int,
) -> Iterator[None]:
    """Replace the output of the backbone of a wrapped network; ``change`` is told which tensors are the images."""
    model, module, way_out = _found_backbone(model, backbone, "backbone")
    network = type(model.network).__name__
    calls: list[nn.Module] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if model._trying:  # which sizes the network takes
            return output
        calls.append(module)
        images = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        shapes: list[tuple[int, ...]] = []
        map_features(lambda feature: shapes.append(tuple(feature.shape)), output)
        rows = len(images[0]) if images else 0
        if not shapes or any(shape[:1] != (rows,) for shape in shapes):
            found = f"tensors of the shapes {shapes}" if shapes else type(output).__name__
            raise NetworkError(
                f"the {type(module).__name__} of the network ({network}) returned {found} for {rows} images; expected "
                f"features with a row for each image; {way_out}"
            )
        return change(output, lambda feature: any(feature is image for image in images))

    def check(*_: Any) -> None:
        if not calls:
            raise NetworkError(
                f"the {type(module).__name__} of the network ({network}) is not called as a module, so that its "
                f"features cannot be changed (self.encoder(x), not self.encoder.forward_features(x)); {way_out}"
            )

    before = model._rows_per_image
    handles = [module.register_forward_hook(hook, with_kwargs=True), model.register_forward_hook(check)]
    model._rows_per_image = rows_per_image
    try:
        yield
    finally:
        model._rows_per_image = before
        for handle in handles:
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
    model, module, way_out = _found_backbone(model, features, "features")
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

    handles = [model.network.register_forward_pre_hook(note), module.register_forward_hook(hook)]
    try:
        yield found
        if seen and not found:
            raise NetworkError(
                f"the {type(module).__name__} of the network ({network}) is not called as a module; {way_out}"
            )
    finally:
        for handle in handles:
            handle.remove()


def _found_backbone(model: nn.Module, name: str | None, argument: str) -> tuple[Segmenter, nn.Module, str]:
    """Find the backbone of a wrapped network, and say how to name another one."""
    if not isinstance(model, Segmenter):
        raise TypeError(f"the model is {type(model).__name__}; expected stseg.Segmenter(network)")
    module = backbone_of(model.network, name, argument=argument)
    other = next((name for name, child in model.network.named_modules() if name and child is not module), "name")
    way_out = f"name the submodule that returns them, as in {argument}={other!r}"
    if module is None:
        raise NetworkError(
            f"no features are found in the network ({type(model.network).__name__}), as it has no encoder or backbone; "
            f"{way_out}"
        )
    return model, module, way_out
