"""Flaw maps of GCT (Ke et al., ECCV 2020): where predictions are wrong, and whose prediction to follow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stseg.functional._checks import check_same_shape
from stseg.functional.classes import one_hot

_LEAST_SPREAD = 1e-3


def flaw_target(probabilities: Tensor, masks: Tensor, *, ignore_index: int = 255) -> Tensor:
    """Make the map that a flaw detector learns: where a prediction differs from its mask.

    The ground truth of GCT (Ke et al., ECCV 2020, section 3): half the sum over classes of the absolute difference,
    blurred, dilated by 3 x 3 pixels, blurred again, and scaled to ``[0, 1]`` for each image. The kernels measure about
    1/8 and 1/4 of the shorter side.

    Args:
        probabilities: ``(B, K, H, W)``, the prediction.
        masks: ``(B, H, W)`` integers.
        ignore_index: mask value of pixels without a label: they are no flaws, and 0 in the result.

    Returns:
        ``(B, H, W)`` float32 in ``[0, 1]``, without gradient.

    Example:
        >>> probabilities = torch.zeros(1, 2, 32, 32)
        >>> probabilities[:, 0] = 1
        >>> masks = torch.zeros(1, 32, 32, dtype=torch.int64)
        >>> masks[:, 8:12, 20:24] = 1  # not found
        >>> divmod(int(flaw_target(probabilities, masks).argmax()), 32)
        (9, 21)
    """
    known, side = masks != ignore_index, min(masks.shape[-2:])
    difference = (one_hot(masks, probabilities.shape[1]) - probabilities.detach().float()).abs().sum(1) / 2
    flaws = gaussian_blur(torch.where(known, difference, 0.0), _odd(side // 8))
    flaws = gaussian_blur(F.max_pool2d(flaws[:, None], kernel_size=3, stride=1, padding=1)[:, 0], _odd(side // 4))
    return _scaled(flaws, known)


def refine_flaws(flaws: Tensor, *, where: Tensor | None = None, least: float = 0.1) -> Tensor:
    """Prepare the map of a flaw detector for the comparison of two networks, as in GCT (Ke et al., ECCV 2020).

    Negative flaws become 0, the map is blurred, and scaled to ``[0, 1]`` for each image. An image with no flaw
    above ``least`` has none at all. The kernel measures about 1/16 of the shorter side.

    Args:
        flaws: ``(B, H, W)`` floats.
        where: ``(B, H, W)`` bool, the pixels that count; the others are 0. None for all.
        least: flaws up to here are none, if there are no others.

    Returns:
        ``(B, H, W)`` float32 in ``[0, 1]``, without gradient.

    Example:
        >>> refine_flaws(torch.tensor([[[-1.0, 0.5, 2.0]], [[-1.0, 0.0, 0.1]]]))
        tensor([[[0.0000, 0.2500, 1.0000]],
        <BLANKLINE>
                [[0.0000, 0.0000, 0.0000]]])
    """
    where = torch.ones_like(flaws, dtype=torch.bool) if where is None else where
    check_same_shape("where", where, "flaws", flaws)
    flaws = torch.where(where, flaws.detach().float().clamp(min=0), 0.0)
    flaws = gaussian_blur(flaws, _odd(min(flaws.shape[-2:]) // 16))
    return torch.where(flaws.amax((1, 2), keepdim=True) > least, _scaled(flaws, where), 0.0)


def less_flawed_target(
    one: Tensor, other: Tensor, flaws: Tensor, flaws_of_other: Tensor, *, threshold: float = 0.6
) -> tuple[Tensor, Tensor]:
    """Take each pixel from the prediction that has the smaller flaw there.

    The target of the dynamic consistency of GCT (Ke et al., ECCV 2020, section 3), for the first network. Flaws above
    the threshold are all alike: where both predictions are bad, neither is a target of the other.

    Args:
        one: ``(B, K, H, W)``, the prediction of the network that learns.
        other: ``(B, K, H, W)``, that of the other network.
        flaws: ``(B, H, W)`` in ``[0, 1]``, flaws of ``one``.
        flaws_of_other: ``(B, H, W)`` in ``[0, 1]``, flaws of ``other``.
        threshold: flaw above which a prediction is bad.

    Returns:
        The target ``(B, K, H, W)``, without gradient: ``one`` where its flaw is not the larger one, so that nothing is
        learned there, else ``other``; and ``(B, H, W)`` bool, True where both are bad.

    Raises:
        ValueError: if the shapes do not match.

    Example:
        >>> one, other = torch.full((1, 1, 1, 3), 1.0), torch.full((1, 1, 1, 3), 2.0)
        >>> flaws, flaws_of_other = torch.tensor([[[0.1, 0.9, 0.9]]]), torch.tensor([[[0.2, 0.2, 0.7]]])
        >>> target, bad = less_flawed_target(one, other, flaws, flaws_of_other)
        >>> target.flatten().tolist(), bad.flatten().tolist()
        ([1.0, 2.0, 1.0], [False, False, True])
    """
    check_same_shape("one", one, "other", other)
    check_same_shape("flaws", flaws, "flaws_of_other", flaws_of_other)
    bad, bad_other = flaws > threshold, flaws_of_other > threshold
    worse = flaws.masked_fill(bad, 1.0) > flaws_of_other.masked_fill(bad_other, 1.0)
    return torch.where(worse[:, None], other, one).detach(), bad & bad_other


def gaussian_blur(maps: Tensor, kernel_size: int) -> Tensor:
    """Blur ``(B, H, W)`` maps in float32 by a Gaussian kernel of an odd size; borders are reflected.

    Its sigma is ``0.3 * ((kernel_size - 1) / 2 - 1) + 0.8``, as in OpenCV.
    """
    sigma, half = blur_sigma(kernel_size), kernel_size // 2
    offset = torch.arange(-half, half + 1, device=maps.device, dtype=torch.float32)
    kernel = (-(offset**2) / (2 * sigma**2)).exp()
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    with torch.autocast(maps.device.type, enabled=False):
        padded = F.pad(maps.float()[:, None], (half, half, half, half), mode="reflect")
        return F.conv2d(F.conv2d(padded, kernel), kernel.mT)[:, 0]


def blur_sigma(kernel_size: int) -> float:
    return 0.3 * ((kernel_size - 1) / 2 - 1) + 0.8


def _odd(size: int) -> int:
    return size + 1 - size % 2


def _scaled(maps: Tensor, where: Tensor) -> Tensor:
    """Scale each map to ``[0, 1]`` over the pixels that count, and set the others to 0.

    A map that is flat but for rounding errors stays near 0.
    """
    low = maps.masked_fill(~where, torch.inf).amin((1, 2), keepdim=True)
    high = maps.masked_fill(~where, -torch.inf).amax((1, 2), keepdim=True)
    return torch.where(where, (maps - low) / (high - low).clamp(min=_LEAST_SPREAD), 0.0)
