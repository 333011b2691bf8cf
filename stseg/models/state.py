"""Device, mode and weights of a network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter or buffer; the CPU if it has none."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def place(model: nn.Module, device: torch.device | str | None) -> nn.Module:
    """Move a model to a device; None leaves it where it is."""
    return model if device is None else model.to(device)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Set models to evaluation mode, and restore the mode of every submodule on exit.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
        >>> _ = net[0].eval()  # frozen by the caller
        >>> with evaluating(net):
        ...     net.training
        False
        >>> net.training, net[0].training
        (True, False)
    """
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the model's state dict on the CPU, each tensor with its own memory."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


def fingerprint(model: nn.Module, *, weights: bool = True) -> str:
    """Compute a hash of a model's architecture and weights.

    It does not depend on the mode or the device.

    Example:
        >>> net = nn.Conv2d(3, 2, 1)
        >>> before = fingerprint(net)
        >>> _ = nn.init.zeros_(net.bias)
        >>> len(before), fingerprint(net) == before
        (16, False)
    """
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))  # addresses differ from run to run
    total = hashlib.sha256(text.encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            if weights:
                total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:16]
