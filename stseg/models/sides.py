"""Trial of the image sides that a network takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stseg.errors import NetworkError
from stseg.models.state import evaluating

_STRIDES = (1, 2, 4, 7, 8, 12, 14, 16, 24, 28, 32, 48, 56, 64, 96, 112, 128, 224, 256)
_LEAST = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)


class Sides(NamedTuple):
    """Sides that a network takes."""

    stride: int
    """Number that the sides must be divisible by."""
    least: int
    """Smallest side."""

    def padded(self, side: int) -> int:
        """Return the smallest side that the network takes and that is not below ``side``."""
        side = max(side, self.least)
        return side + -side % self.stride


def scale_of(image: torch.Size, logits: torch.Size) -> int | None:
    """Return the integer that scales the logits' height and width to the image's; None if there is none.

    Example:
        >>> scale_of(torch.Size([1, 3, 128, 192]), torch.Size([1, 5, 32, 48]))
        4
    """
    (height, width), (h, w) = image[-2:], logits[-2:]
    factor = height // h if h else 0
    return factor if factor >= 1 and h * factor == height and w * factor == width else None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def find_sides(network: nn.Module, logits_of: Callable[[Tensor], Tensor], x: Tensor) -> Sides | None:
    """Find the smallest stride and side at which the output, scaled by one integer, covers the image.

    Args:
        network: the network, for its mode and the output stride that it may report.
        logits_of: from a batch to the logits of the network.
        x: a batch; its size does not matter.

    Returns:
        The sides; None if there are none among those that are tried.

    Raises:
        NetworkError: if the output holds no logits.
    """
    reported = getattr(getattr(network, "encoder", None), "output_stride", None)
    first = reported if isinstance(reported, int) and reported > 0 else 1
    strides = [first, *(stride for stride in _STRIDES if stride > first and stride % first == 0)]
    raised = False

    def scale_at(height: int, width: int) -> int | None:
        nonlocal raised
        images = x.new_zeros(1, x.shape[1], height, width)
        try:
            return scale_of(images.shape, logits_of(images).shape)
        except NetworkError:  # which does not depend on the size
            raise
        except Exception:  # libraries raise different types
            raised = True
            return None

    def scale_of_stride(place: int, smallest: int) -> tuple[int, int | None]:
        """Return a side above ``smallest`` for a stride, and the scale of the output there."""
        stride = strides[place]
        # Sides that share no other divisor, and large enough to tell this stride from the next one.
        after = strides[place + 1] if place + 1 < len(strides) else 2 * stride
        times = max(-(-smallest // stride), after // (after - stride) + 1)
        return stride * times, scale_at(stride * times, stride * (times + 1))

    def search() -> Sides | None:
        for smallest in (130, 400):
            for place, stride in enumerate(strides):
                side, scale = scale_of_stride(place, smallest)
                if scale is None:
                    continue
                if side > 1.5 * smallest:  # smaller strides may have failed for their smaller sides
                    for earlier in range(place):
                        other, found = scale_of_stride(earlier, side)
                        if found is not None:
                            side, stride, scale = other, strides[earlier], found
                            break
                takes = (least for least in _LEAST if scale_at(*(2 * [least + -least % stride])) == scale)
                return Sides(stride, next(takes, side))
            if not raised:
                break  # it takes all sizes, and its output never covers the image
        return None

    devices = [x.device] if x.device.type == "cuda" else []
    with evaluating(network), torch.no_grad(), torch.random.fork_rng(devices=devices):
        return search()
