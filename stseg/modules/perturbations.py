"""Perturbations of features, for consistency of decoders: those of CCT, with ``channel_dropout`` and masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def feature_noise(features: Tensor, amount: float = 0.3) -> Tensor:
    """Add noise in proportion to the features: ``z + z * n``, n uniform from ``-amount`` to ``amount``.

    F-Noise of CCT (Ouali et al., CVPR 2020, section 3.3).

    Args:
        features: ``(B, ...)`` floats. Every value of an image has noise of its own, the images of a batch share it.
        amount: largest relative change, 0 or more.

    Returns:
        New features of the same shape.

    Raises:
        ValueError: if ``amount`` is negative.

    Example:
        >>> noisy = feature_noise(torch.full((1, 8, 4, 4), 10.0))
        >>> bool((7 <= noisy).all() and (noisy <= 13).all())
        True
    """
    if not amount >= 0:
        raise ValueError(f"amount is {amount}; expected 0 or more")
    noise = torch.rand(features.shape[1:], device=features.device, dtype=features.dtype)
    return features * (1 + amount * (2 * noise - 1))


def feature_drop(features: Tensor, low: float = 0.7, high: float = 0.9) -> Tensor:
    """Zero the positions of the strongest features.

    F-Drop of CCT (Ouali et al., CVPR 2020, section 3.3): the attention of a position is the mean over its channels.
    All positions are zeroed whose attention is not below a share of the largest in the image. The share is drawn once
    for the batch, uniformly.

    Args:
        features: ``(B, C, H, W)``.
        low: smallest share, from 0 to 1.
        high: largest share, from ``low`` to 1.

    Returns:
        New features of the same shape.

    Raises:
        ValueError: if the features have another number of dimensions, or the shares are out of their range.

    Example:
        >>> feature_drop(torch.tensor([1.0, 2.0, 10.0]).view(1, 1, 1, 3)).flatten().tolist()
        [1.0, 2.0, 0.0]
    """
    _check_maps(features)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low is {low} and high is {high}; expected 0 <= low <= high <= 1")
    attention = features.detach().float().mean(1, keepdim=True)
    share = low + (high - low) * torch.rand((), device=features.device)
    return features * (attention < share * attention.amax((2, 3), keepdim=True))


def guided_cutout(features: Tensor, components: Tensor, share: float = 0.4) -> Tensor:
    """Zero a random rectangle in the bounding box of every object.

    G-Cutout of CCT (Ouali et al., CVPR 2020, section 3.3).

    Args:
        features: ``(B, C, H, W)``.
        components: ``(B, H, W)`` int64, the objects, as :func:`stseg.functional.connected_components` numbers them.
        share: sides of the rectangle as a share of those of the box, rounded to whole positions, from 0 to 1.

    Returns:
        New features of the same shape.

    Raises:
        ValueError: if the shapes do not match, or ``share`` is out of its range.

    Example:
        >>> from stseg.functional import connected_components
        >>> components = connected_components(torch.ones(1, 5, 5, dtype=torch.bool))
        >>> int((guided_cutout(torch.ones(1, 1, 5, 5), components) == 0).sum())
        4
    """
    _check_maps(features)
    if components.shape != features[:, 0].shape:
        raise ValueError(
            f"components have shape {tuple(components.shape)} and features {tuple(features.shape)}; expected "
            "(B, H, W) and (B, C, H, W)"
        )
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected a number from 0 to 1")
    boxes, image = cutout_boxes(components, share)
    return features * ~_covered(boxes, image, components)[:, None]


def cutout_boxes(components: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Draw a rectangle in the bounding box of every component.

    Returns:
        ``(B * H * W, 4)`` int64, half-open: top, left, bottom, right, one for every possible number of a component,
        empty for those that do not exist; and ``(B * H * W,)`` int64, their images.
    """
    batch, height, width = components.shape
    place = components.device
    image = torch.arange(batch, device=place)[:, None, None].expand_as(components)
    # Numbers from 1 to H * W of each image become one index; pixels outside go to the extra place at the end.
    slots = batch * height * width
    slot = torch.where(components > 0, image * height * width + components - 1, slots).flatten()
    row = torch.arange(height, device=place)[:, None].expand_as(components).flatten()
    column = torch.arange(width, device=place).expand_as(components).flatten()

    def extremes(values: Tensor, side: int) -> tuple[Tensor, Tensor]:
        start = torch.full((slots + 1,), side, device=place).scatter_reduce(0, slot, values, "amin")[:-1]
        end = torch.full((slots + 1,), -1, device=place).scatter_reduce(0, slot, values, "amax")[:-1] + 1
        return start, (end - start).clamp(min=0)

    edges = []
    for values, side in ((row, height), (column, width)):
        start, length = extremes(values, side)
        cut = (length * share).round().long()
        start = start + (torch.rand(slots, device=place) * (length - cut + 1)).long().clamp(max=side)
        edges.append((start, start + cut))
    (top, bottom), (left, right) = edges
    return torch.stack((top, left, bottom, right), 1), torch.arange(slots, device=place) // (height * width)


def _covered(boxes: Tensor, image: Tensor, components: Tensor) -> Tensor:
    """Return ``(B, H, W)`` bool, True inside any rectangle of the image: corners counted, then summed up."""
    batch, height, width = components.shape
    corners = torch.zeros(batch * (height + 1) * (width + 1), dtype=torch.int64, device=boxes.device)
    top, left, bottom, right = boxes.unbind(1)
    exists = ((bottom > top) & (right > left)).long()
    for row, column, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        row, column = row.clamp(max=height), column.clamp(max=width)
        corners = corners.scatter_add(0, (image * (height + 1) + row) * (width + 1) + column, sign * exists)
    return corners.view(batch, height + 1, width + 1).cumsum(1).cumsum(2)[:, :height, :width] > 0


@torch.no_grad()
def adversarial_perturbation(decoder: Callable[[Tensor], Tensor], features: Tensor, length: float = 2.0) -> Tensor:
    """Find the small change of features that changes the probabilities of a decoder most.

    Virtual adversarial training (Miyato et al., 2018), for features as I-VAT of CCT (Ouali et al., CVPR 2020, section
    3.3): one step of power iteration from a random direction d, towards the largest change of the KL divergence. For a
    change ``xi * d`` with a small xi its gradient is ``xi * J' S J d``, where J is the derivative of the logits and S
    that of the softmax. This product is computed as it is, in float32: the quotient of the authors, with ``xi = 1e-6``,
    is below the precision of float32.

    Args:
        decoder: ``(B, C, H, W)`` features to logits ``(B, K, h, w)``. Its parameters get no gradients.
        features: ``(B, C, H, W)``.
        length: L2 norm of the change of each image.

    Returns:
        The change, of the shape and dtype of the features, without gradient; 0 where no change has an effect.

    Raises:
        ValueError: if the features have another number of dimensions, or ``length`` is negative.

    Example:
        >>> decoder = torch.nn.Conv2d(8, 3, 1)
        >>> change = adversarial_perturbation(decoder, torch.rand(2, 8, 4, 4))
        >>> [round(float(each.norm()), 4) for each in change]
        [2.0, 2.0]
    """
    _check_maps(features)
    if not length >= 0:
        raise ValueError(f"length is {length}; expected 0 or more")
    with torch.autocast(features.device.type, enabled=False):
        origin = features.detach().float().requires_grad_()
        direction = _unit(torch.rand_like(origin) - 0.5)
        with torch.enable_grad():
            logits = decoder(origin)
            anything = torch.zeros_like(logits, requires_grad=True)
            (transposed,) = torch.autograd.grad(logits, origin, anything, create_graph=True)  # J' of it
        (change,) = torch.autograd.grad(transposed, anything, direction, retain_graph=True)  # J d
        probability = logits.detach().softmax(1)
        change = probability * (change - (probability * change).sum(1, keepdim=True))
        (gradient,) = torch.autograd.grad(logits, origin, change)
        return (length * _unit(gradient)).to(features.dtype)


def _unit(maps: Tensor) -> Tensor:
    norm = maps.square().sum((1, 2, 3), keepdim=True).sqrt()
    return torch.where(norm > 0, maps / norm.clamp(min=torch.finfo(maps.dtype).tiny), 0.0)


def _check_maps(features: Tensor) -> None:
    if features.ndim != 4:
        raise ValueError(f"features have shape {tuple(features.shape)}; expected maps (B, C, H, W)")
