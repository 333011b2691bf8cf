"""Work shared between the processes of ``torch.distributed``; no-ops in a single process."""

from stseg.distributed.batchnorm import synchronized_batchnorm
from stseg.distributed.processes import (
    all_gather,
    all_gather_batch,
    all_gather_rows,
    all_reduce_sum,
    barrier,
    broadcast_buffers,
    rank,
    setup_device,
    world_size,
)

__all__ = [
    "all_gather",
    "all_gather_batch",
    "all_gather_rows",
    "all_reduce_sum",
    "barrier",
    "broadcast_buffers",
    "rank",
    "setup_device",
    "synchronized_batchnorm",
    "world_size",
]
