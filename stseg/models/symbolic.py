"""Padding, cropping and pooling by operations that tracers record for every size.

In ``torch.export`` and ``torch.jit.trace``, which ``torch.onnx.export`` uses, heights and widths are symbols or
tensors: what Python computes or decides with them may be recorded as it was for the example.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stseg.models.sides import Sides


def _is_exporting_early() -> bool:
    """Return what ``torch.compiler.is_exporting`` does where it is missing, but not of an export through dynamo."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


_is_exporting = getattr(torch.compiler, "is_exporting", _is_exporting_early)


def is_traced() -> bool:
    """Return whether a program is being made of this call, for images of other sizes too."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
    return tracing or _is_exporting()


def pad(x: Tensor, sides: Sides) -> Tensor:
    """Pad right and bottom by repeating the border, up to the sides that a network takes.

    Example:
        >>> pad(torch.arange(3.0).view(1, 1, 1, 3), Sides(stride=4, least=1))[0, 0, -1]
        tensor([0., 1., 2., 2.])
    """
    if sides == Sides(1, 1):
        return x
    least = -(-sides.least // sides.stride)
    for dim in (2, 3):
        side = x.shape[dim]
        # A multiple of the stride by its form: so the layers of the network have sizes without a remainder.
        padded = _at_least((side + (sides.stride - 1)) // sides.stride, least) * sides.stride
        x = x.index_select(dim, torch.arange(padded, device=x.device).clamp(max=side - 1))
    return x


def crop(x: Tensor, like: Tensor) -> Tensor:
    """Crop a map to the height and width of another one; unlike a slice, for no side is it a special case."""
    for dim in (2, 3):
        x = x.index_select(dim, torch.arange(like.shape[dim], device=x.device))
    return x


def is_same_size(x: Tensor, other: Tensor) -> bool:
    """Return whether two maps have the same size for every size of the image, as far as that is known."""
    for dim in (2, 3):
        one, two = x.shape[dim], other.shape[dim]
        if isinstance(one, Tensor) or isinstance(two, Tensor):
            return False
        if isinstance(one, torch.SymInt) or isinstance(two, torch.SymInt):
            from torch.fx.experimental.symbolic_shapes import statically_known_true

            if not statically_known_true(one == two):
                return False
        elif one != two:
            return False
    return True


class AveragePooling(TorchFunctionMode):
    """Computes adaptive average pooling to several cells as two products of matrices, for any size.

    PyTorch's exporters record where the cells of the example lie.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.interpolate and kwargs.get("mode") == "area" and kwargs.get("size") is not None:
            func, kwargs = F.adaptive_avg_pool2d, {"output_size": kwargs["size"]}  # which that is
        if func is F.adaptive_avg_pool2d:
            return _pooled(*args, **kwargs)
        return func(*args, **kwargs)


def _pooled(input: Tensor, output_size: Any) -> Tensor:
    cells = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if input.ndim != 4 or all(count in (1, None) for count in cells):
        return F.adaptive_avg_pool2d(input, output_size)
    for dim, count in ((2, cells[0]), (3, cells[1])):
        if count is not None:
            weights = _cell_weights(input, dim, count)
            input = weights @ input if dim == 2 else input @ weights.transpose(0, 1)
    return input


def _cell_weights(x: Tensor, dim: int, count: int) -> Tensor:
    """Return the weights ``(count, side)`` of the positions along a side in the averages of cells."""
    side = x.shape[dim]
    cell = torch.arange(count, device=x.device)
    start = torch.div(cell * side, count, rounding_mode="floor")[:, None]
    end = torch.div((cell + 1) * side + (count - 1), count, rounding_mode="floor")[:, None]
    position = torch.arange(side, device=x.device)
    return ((position >= start) & (position < end)).to(x.dtype) / (end - start).to(x.dtype)


def _at_least(count: Any, least: int) -> Any:
    if least <= 1:
        return count
    return count.clamp(min=least) if isinstance(count, Tensor) else torch.sym_max(count, least)
