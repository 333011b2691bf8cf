"""Distance of two sets of feature vectors by their means."""

from __future__ import annotations

import torch
from torch import Tensor

from stseg.distributed import all_reduce_sum, world_size


def feature_matching(real: Tensor, fake: Tensor) -> Tensor:
    """Compute the mean absolute difference, over channels, of the mean real and the mean fake feature.

    The loss of Salimans et al. (NeurIPS 2016, section 3.1) with the distance of S4GAN (Mittal et al., TPAMI 2019). The
    means are over the rows of all processes.

    Args:
        real: ``(B, C)`` floats. Gradients flow to both unless they are detached.
        fake: ``(B', C)`` floats.

    Returns:
        Scalar, the same in all processes; the average of its gradients over the processes is that of the whole batch.

    Raises:
        ValueError: if the two are not rows of as many channels, or one has no rows.

    Example:
        >>> feature_matching(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor(1.5000)
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or 0 in (len(real), len(fake)):
        raise ValueError(
            f"real has shape {tuple(real.shape)} and fake {tuple(fake.shape)}; expected (B, C) and (B', C), with rows"
        )
    return (_mean_of_rows(real) - _mean_of_rows(fake)).abs().mean()


def _mean_of_rows(features: Tensor) -> Tensor:
    """Average over the rows of all processes: ``(B, C)`` -> ``(C,)``."""
    own = features.float().sum(0) if features.dtype.itemsize < 4 else features.sum(0)
    rows = all_reduce_sum(torch.full((), len(features), dtype=own.dtype, device=own.device))
    # The value is that of all processes; the gradient reaches the own rows, times the number of processes, by which
    # DistributedDataParallel divides.
    return (all_reduce_sum(own.detach()) + world_size() * (own - own.detach())) / rows
