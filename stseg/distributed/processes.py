"""Sharing work between the processes of ``torch.distributed``; all of it does nothing in a single process."""

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
    """The device of this process, once it has met the others that ``torchrun`` or ``accelerate launch`` started.

    In a single process the best one there is. A group of processes that is formed here is left again at the exit of
    the interpreter: the threads of one that is still there then abort the process.
    """
    met_before = _on()
    device: torch.device = PartialState().device
    if _on() and not met_before:
        atexit.register(_leave)
    return device


def _leave() -> None:
    # After an exception the others may be waiting for this process, and leaving for them: the launcher ends them.
    if _on() and not hasattr(sys, "last_value"):
        gc.collect()  # what still refers to the group, such as a DistributedDataParallel in a cycle, keeps its threads
        dist.destroy_process_group()


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


def all_gather(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers."""
    if not _on():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all processes, on the tensor's own device."""
    if not _on():
        return tensor
    if tensor.device.type == "cpu":  # of which NCCL takes none
        return torch.stack(all_gather(tensor)).sum(0)
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def broadcast_buffers(model: nn.Module) -> None:
    """Give all processes the buffers of the first one: running statistics differ, each has seen its own images."""
    if _on():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def _on() -> bool:
    return dist.is_available() and dist.is_initialized()
