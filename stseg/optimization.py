"""How one step changes the weights: learning rates, optimizer, loss."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stseg.batchnorm import synchronised
from stseg.config import TrainConfig
from stseg.distributed import summed, world_size
from stseg.inference import autocast


def poly(step: int, total: int, power: float) -> float:
    """Factor of the learning rate after ``step`` of ``total`` steps: ``(1 - step / total) ** power``.

    Example:
        >>> poly(0, 100, 0.9), round(poly(50, 100, 0.9), 4)
        (1.0, 0.5359)
    """
    return float((1 - step / total) ** power)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The backbone at the base learning rate, the rest at ``head_lr_factor`` times that.

    Raises:
        ValueError: if ``config.backbone`` names no submodule, or nothing can be trained.
    """
    network = getattr(model, "network", model)
    backbone = _backbone(network, config.backbone)
    inside = set() if backbone is None else {id(p) for p in backbone.parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"the network ({type(network).__name__}) has no parameters that require gradients")
    base = [p for p in trained if backbone is None or id(p) in inside]
    head = [p for p in trained if backbone is not None and id(p) not in inside]
    groups = [(base, config.lr), (head, config.lr * config.head_lr_factor)]
    return [{"params": params, "lr": lr, "initial_lr": lr} for params, lr in groups if params]


def _backbone(network: nn.Module, name: str | None) -> nn.Module | None:
    if name is not None:
        try:
            return network.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"backbone is {name!r}; the network ({type(network).__name__}) has no such submodule"
            ) from None
    names = ("encoder", "backbone", getattr(network, "base_model_prefix", None) or "encoder")
    found = (getattr(network, name, None) for name in names)
    return next((module for module in found if isinstance(module, nn.Module)), None)


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """What ``config.optimizer`` names, over the groups of :func:`parameter_groups`."""
    groups = parameter_groups(model, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)


def train_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    masks: Tensor,
    config: TrainConfig,
    ignore_index: int,
    is_pseudo: Tensor | None = None,
) -> float:
    """One iteration.

    The loss is ``(sum over labelled pixels + lambda * sum over pseudo-labelled pixels) / number of pixels`` of the
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
    with synchronised(config.sync_batchnorm):  # the backward pass too: it may compute layers once more
        with autocast(images.device, config.precision):
            logits = network(images)
        losses = _summed_losses(logits.float(), masks, is_pseudo, config.pseudo_weight, ignore_index)
        # The mean over the whole batch, as in a single process; DistributedDataParallel averages over processes.
        total = summed(torch.stack([losses.detach(), (masks != ignore_index).sum().float()]))
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
