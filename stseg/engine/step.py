"""One training step: losses, gradients, a check, the optimizers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from stseg.distributed import all_reduce_sum, synchronized_batchnorm, world_size
from stseg.engine.config import TrainConfig
from stseg.engine.method import Batch, Losses, Method
from stseg.models.precision import autocast


def training_step(
    network: nn.Module,
    method: Method,
    optimizers: Sequence[torch.optim.Optimizer],
    batch: Batch,
    config: TrainConfig,
) -> dict[str, float]:
    """Run one training step.

    Args:
        network: the method, in training mode; inside DistributedDataParallel where there are several processes.
        method: the method itself.
        optimizers: its optimizers.
        batch: the batch of this process.
        config: the settings.

    Returns:
        The loss, as ``"loss"``, and the values that the method logged; means over all processes.

    Raises:
        FloatingPointError: if loss or gradients are not finite; method and optimizers are then unchanged.
    """
    # Buffers change in the forward pass: a batch with a non-finite loss also corrupts the running statistics.
    buffers = list(method.buffers())
    before = [buffer.clone() for buffer in buffers]
    with synchronized_batchnorm(config.sync_batchnorm):  # also in the backward pass, which may recompute layers
        with autocast(batch.images.device, config.precision):
            losses: Losses = network(batch)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        losses.total.backward()  # type: ignore[no-untyped-call]
    parameters = [p for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf)  # clips nothing
    total = losses.total.detach().float()
    logged = [torch.as_tensor(value, device=total.device).detach().float() for value in losses.logged.values()]
    values = all_reduce_sum(torch.stack([total, *logged])) / world_size()
    *numbers, finite = torch.cat([values, (values[:1] + norm).isfinite().float()]).tolist()
    if not finite:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        loss = numbers[0]
        raise FloatingPointError("the gradients are not finite" if math.isfinite(loss) else f"the loss is {loss}")
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        method.after_step(batch)
    return dict(zip(("loss", *losses.logged), numbers, strict=True))
