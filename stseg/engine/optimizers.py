"""Parameter groups and optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stseg.engine.config import TrainConfig
from stseg.functional.ramps import polynomial_decay as polynomial_decay
from stseg.models.backbone import backbone_of


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """The backbone at the base learning rate, the rest at ``head_lr_factor`` times that.

    Raises:
        ValueError: if ``config.backbone`` names no submodule, or nothing can be trained.
    """
    network = getattr(model, "network", model)
    backbone = backbone_of(network, config.backbone)
    inside = set() if backbone is None else {id(p) for p in backbone.parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"the network ({type(network).__name__}) has no parameters that require gradients")
    base = [p for p in trained if backbone is None or id(p) in inside]
    head = [p for p in trained if backbone is not None and id(p) not in inside]
    groups = [(base, config.lr), (head, config.lr * config.head_lr_factor)]
    return [{"params": params, "lr": lr, "initial_lr": lr} for params, lr in groups if params]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """What ``config.optimizer`` names, over the groups of :func:`parameter_groups`."""
    groups = parameter_groups(model, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
