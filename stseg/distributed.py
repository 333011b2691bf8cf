"""Sharing work between the processes of ``torch.distributed``; all of it does nothing in a single process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _on() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if _on() else 1


def barrier() -> None:
    """Wait for all processes."""
    if _on():
        dist.barrier()


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers."""
    if not _on():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def summed(tensor: Tensor) -> Tensor:
    """Sum over all processes, on the tensor's own device."""
    if not _on():
        return tensor
    if tensor.device.type == "cpu":  # of which NCCL takes none
        return torch.stack(gathered(tensor)).sum(0)
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def share_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first one: running statistics differ, each has seen its own images."""
    if _on():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _on() -> bool:
    return dist.is_available() and dist.is_initialized()
