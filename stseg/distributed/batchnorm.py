"""Batch normalization over the images of all processes, on any device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from stseg.distributed.processes import world_size


def synchronized_batchnorm(wanted: bool) -> AbstractContextManager[Any]:
    """Make batch normalization in training mode use the statistics of the batches of all processes.

    Outputs, gradients and running statistics are those of one joint batch; the batches may differ in size. The network,
    its state dict and its copies are not modified. Layers in evaluation mode and ``torch.nn.SyncBatchNorm`` are
    unaffected. All processes must run the same layers in the same order. Does nothing in a single process or if
    ``wanted`` is False.

    Example:
        >>> norm, x = torch.nn.BatchNorm2d(3), torch.rand(2, 3, 4, 4)
        >>> with synchronized_batchnorm(True):
        ...     torch.equal(norm(x), F.batch_norm(x, None, None, training=True))
        True
    """
    return _Synchronized() if wanted and world_size() > 1 else nullcontext()


class _Synchronized(TorchFunctionMode):
    """Override of the function that all batch normalization layers call, including fused ones with activations."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    # At least single precision: under autocast x may be bfloat16.
    normalized, mean, var, count = _Normalized.apply(x.to(torch.promote_types(x.dtype, torch.float32)), eps)
    with torch.no_grad():
        unbiased = var * (count / (count - 1))
        for running, value in ((running_mean, mean), (running_var, unbiased)):
            if running is not None:
                running.copy_((1 - momentum) * running + momentum * value)
    shape = _per_channel(x)
    if weight is not None:
        normalized = normalized * weight.reshape(shape)
    if bias is not None:
        normalized = normalized + bias.reshape(shape)
    # The backward pass needs the normalized values, and the next layer may work in place.
    result: Tensor = normalized.to(x.dtype, copy=weight is None and bias is None)
    return result


class _Normalized(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps)`` by channel, with mean and variance over the batches of all processes.

    With y the result, g the gradient for it and means over all processes, the gradient for x is
    ``(g - mean(g) - y * mean(g * y)) / sqrt(var + eps)``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims, shape = _all_but_channels(x), _per_channel(x)
        pixels = x.new_tensor([x.numel() // x.shape[1]])
        total = _summed(torch.cat([x.sum(dims), pixels]))
        count = total[-1]
        mean = total[:-1] / count
        # Not E[x^2] - E[x]^2, which cancels where the mean is large.
        centered = x - mean.reshape(shape)
        var = _summed(centered.square().sum(dims)) / count
        scale = (var + eps).rsqrt()
        normalized = centered * scale.reshape(shape)
        ctx.save_for_backward(normalized, scale, count)
        ctx.mark_non_differentiable(mean, var, count)
        return normalized, mean, var, count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, None]:
        normalized, scale, count = ctx.saved_tensors
        dims, shape = _all_but_channels(normalized), _per_channel(normalized)
        sums = _summed(torch.stack([gradient.sum(dims), (gradient * normalized).sum(dims)]))
        of_gradient, of_product = (each.reshape(shape) for each in sums / count)
        return (gradient - of_gradient - normalized * of_product) * scale.reshape(shape), None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _per_channel(x: Tensor) -> list[int]:
    return [1, -1] + [1] * (x.ndim - 2)


def _summed(values: Tensor) -> Tensor:
    """Sum over all processes in place, on the device, so that training does not synchronize with the CPU."""
    dist.all_reduce(values)
    return values
