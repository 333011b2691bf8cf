"""One training step: loss, gradients, optimizer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.distributed import all_reduce_sum, synchronized_batchnorm, world_size
from stseg.engine.config import TrainConfig
from stseg.models.precision import autocast


def training_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    masks: Tensor,
    config: TrainConfig,
    ignore_index: int,
    is_pseudo: Tensor | None = None,
) -> float:
    """One iteration.

    The loss is ``(sum over labeled pixels + lambda * sum over pseudo-labeled pixels) / number of pixels`` of the
    cross-entropy, where lambda is ``config.pseudo_weight`` and the pixels are those of the batch, on all processes,
    that are not ignored: the L = Ls + lambda * Lu of the paper (Yang et al., CVPR 2022, section 3.1), which at its
    lambda = 1 is the one mean over the mixed batch.

    Args:
        network: in training mode.
        optimizer: of its parameters.
        images: ``(B, C, H, W)``, as the network takes them.
        masks: ``(B, H, W)`` int64.
        config: the settings.
        ignore_index: mask value of pixels that do not count.
        is_pseudo: ``(B,)`` bool, whose masks are pseudo-masks; None where none is.

    Returns:
        The loss.

    Raises:
        FloatingPointError: if loss or gradients are not finite; network and optimizer are left as they were.
    """
    # Buffers change with the forward pass: a batch that ruins the loss ruins the running statistics as well.
    buffers = list(network.buffers())
    before = [buffer.clone() for buffer in buffers]
    with synchronized_batchnorm(config.sync_batchnorm):  # the backward pass too: it may compute layers once more
        with autocast(images.device, config.precision):
            logits = network(images)
        losses = _summed_losses(logits.float(), masks, is_pseudo, config.pseudo_weight, ignore_index)
        # The mean over the whole batch, as in a single process; DistributedDataParallel averages over processes.
        total = all_reduce_sum(torch.stack([losses.detach(), (masks != ignore_index).sum().float()]))
        count = total[1].clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses * (world_size() / count))
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf)  # which clips nothing
    loss, finite = torch.stack([total[0] / count, (total[0] + norm).isfinite().float()]).tolist()
    if not finite:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        raise FloatingPointError("the gradients are not finite" if math.isfinite(loss) else f"the loss is {loss}")
    optimizer.step()
    return float(loss)


def _summed_losses(
    logits: Tensor, masks: Tensor, is_pseudo: Tensor | None, pseudo_weight: float, ignore_index: int
) -> Tensor:
    if is_pseudo is None or pseudo_weight == 1:
        return F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="sum")
    losses = F.cross_entropy(logits, masks, ignore_index=ignore_index, reduction="none")
    return losses.sum((1, 2)) @ torch.where(is_pseudo, pseudo_weight, 1.0)
