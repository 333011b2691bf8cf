"""Parameter groups, optimizers and learning rates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stseg.engine.config import ParameterGroups, TrainConfig
from stseg.functional import polynomial_decay
from stseg.models.backbone import backbone_of
from stseg.models.segmenter import Segmenter


def parameter_groups(module: nn.Module, config: TrainConfig) -> ParameterGroups:
    """Group the trainable parameters: backbones at the base learning rate, the rest at ``head_lr_factor`` times it.

    Args:
        module: a network, or a method with one or more networks. A network without a backbone learns at the base rate;
            parameters outside of any network, such as an auxiliary decoder, learn as a head.
        config: the settings.

    Raises:
        ValueError: if ``config.backbone`` names no submodule of a network, or nothing can be trained.
    """
    bases: set[int] = set()
    for network in _networks(module):
        backbone = backbone_of(network, config.backbone)
        bases.update(id(p) for p in (network if backbone is None else backbone).parameters())
    trained = [p for p in module.parameters() if p.requires_grad]
    if not trained:
        raise ValueError(f"the network ({type(module).__name__}) has no parameters that require gradients")
    base, head = ([p for p in trained if (id(p) in bases) is wanted] for wanted in (True, False))
    groups = [(base, config.lr), (head, config.lr * config.head_lr_factor)]
    return [{"params": params, "lr": lr} for params, lr in groups if params]


def _networks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the bare networks of a method; a module without a wrapped network counts as one."""
    wrapped = [each.network for each in module.modules() if isinstance(each, Segmenter)]
    trained = [network for network in wrapped if any(p.requires_grad for p in network.parameters())]
    yield from trained if wrapped else [module]


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer that ``config.optimizer`` names, over the groups of :func:`parameter_groups`.

    Example:
        >>> optimizer = build_optimizer(nn.Conv2d(3, 2, 1), TrainConfig(steps=1, optimizer="adamw", lr=0.01))
        >>> type(optimizer).__name__, optimizer.param_groups[0]["lr"]
        ('AdamW', 0.01)
    """
    groups = parameter_groups(module, config)
    if callable(config.optimizer):
        return config.optimizer(groups)
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": _can_fuse(module)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, **options)
    if config.momentum:
        # The fused one cannot mix parameters with and without a momentum. Zeros become the gradient, as none does.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_critic_optimizer(module: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Build the optimizer of a network beside the one that is trained, such as a critic."""
    return torch.optim.Adam(module.parameters(), lr=lr, betas=(0.9, 0.99), fused=_can_fuse(module))


def _can_fuse(module: nn.Module) -> bool:
    """Return whether an optimizer can be one pass over the parameters, which a device can skip by itself."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in module.parameters())


def lay_out_states(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Lay out the states of optimizers in memory as the parameters are, which fused ones take for granted."""
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                is_like = isinstance(value, Tensor) and value.shape == parameter.shape
                if is_like and value.stride() != parameter.stride():
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def keep_initial_rates(optimizers: list[torch.optim.Optimizer]) -> None:
    """Store the initial learning rate of each group for the schedule, as torch's schedulers do."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])


def learning_rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Return the factor of all learning rates in a step."""
    schedule = config.schedule or (lambda step, steps: polynomial_decay(step, steps, config.power))
    return schedule(step, steps)


def set_learning_rates(optimizers: list[torch.optim.Optimizer], config: TrainConfig, step: int, steps: int) -> float:
    """Set the learning rates of a step, and return their common factor."""
    factor = learning_rate_factor(config, step, steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
    return factor
