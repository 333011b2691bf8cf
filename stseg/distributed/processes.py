"""Sharing work between the processes of ``torch.distributed``; no-ops in a single process."""

from __future__ import annotations

import atexit
import gc
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn


def setup_device() -> torch.device:
    """Join the process group that ``torchrun`` or ``accelerate launch`` started, and return the device of this process.

    In a single process, return the best device available. A process group formed here is destroyed when the
    interpreter exits: its threads would otherwise abort the process.
    """
    met_before = _on()
    device: torch.device = PartialState().device
    if _on() and not met_before:
        atexit.register(_leave)
    return device


def _leave() -> None:
    # After an exception the other processes may wait for this one, and destroying the group would block: leave that to
    # the launcher.
    if _on() and not hasattr(sys, "last_value"):
        gc.collect()  # references to the group, such as a DistributedDataParallel in a cycle, keep its threads alive
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _on() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _on() else 1


def barrier() -> None:
    """Wait for all processes."""
    if _on():
        dist.barrier()


def all_gather(value: Any) -> list[Any]:
    """Gather the values of all processes, in the order of their ranks."""
    if not _on():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Concatenate the rows of all processes, in the order of their ranks, on the tensor's own device.

    The tensors have the same shape in all processes; no gradient flows through it.
    """
    tensor = tensor.detach()
    if not _on():
        return tensor
    if tensor.device.type == "cpu":  # not supported by NCCL
        return torch.cat(all_gather(tensor))
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def all_gather_batch(rows: Tensor) -> Tensor:
    """Concatenate the rows of a batch that the processes share, in the order that they have in a single process.

    Row i of the batch is in process i modulo their number, as :func:`stseg.fit` deals samples out.

    Args:
        rows: of the same shape in all processes; no gradient flows through it.
    """
    return all_gather_rows(rows).reshape(world_size(), *rows.shape).transpose(0, 1).flatten(0, 1)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, on the tensor's own device."""
    if not _on():
        return tensor
    if tensor.device.type == "cpu":  # not supported by NCCL
        return torch.stack(all_gather(tensor)).sum(0)
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of the first process to all: running statistics differ, as each process sees other images."""
    if _on():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _on() -> bool:
    return dist.is_available() and dist.is_initialized()
