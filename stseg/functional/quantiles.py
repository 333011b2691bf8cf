"""Quantiles of the values that count."""

from __future__ import annotations

import torch
from torch import Tensor

from stseg.distributed import all_gather_rows
from stseg.functional._checks import check_same_shape


def quantile_over_processes(values: Tensor, share: float, *, where: Tensor) -> Tensor:
    """Compute a quantile of the values of all processes that count, as ``numpy.percentile`` does.

    Args:
        values: floats of any shape, the same in all processes.
        share: from 0, the least value, to 1, the greatest; interpolated linearly between neighbors.
        where: bool of the same shape, the values that count.

    Returns:
        Scalar; infinite if no value counts. Does not synchronize with the device.

    Raises:
        ValueError: if the shapes differ, or ``share`` is not in [0, 1].

    Example:
        >>> values = torch.tensor([3.0, 1.0, 2.0, 9.0])
        >>> quantile_over_processes(values, 0.75, where=torch.tensor([True, True, True, False]))
        tensor(2.5000)
    """
    check_same_shape("where", where, "values", values)
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; expected a number in [0, 1]")
    # Not torch.quantile, which takes at most 16 million values.
    ranked = all_gather_rows(values.masked_fill(~where, torch.inf).flatten()).sort().values
    place = share * (ranked.isfinite().sum() - 1).clamp(min=0).double()
    low, high = ranked.take(place.floor().long()), ranked.take(place.ceil().long())
    between = torch.where(low.isfinite() & high.isfinite(), (high - low) * place.frac().to(low.dtype), 0.0)
    return low + between
