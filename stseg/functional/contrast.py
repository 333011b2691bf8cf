"""Contrastive losses of feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stseg.functional.losses import mean_over_processes

_EXCLUDED = -1e4  # not -inf, whose gradient is NaN where a whole row is excluded


def directional_contrast(
    anchors: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    labels: Tensor,
    negative_labels: Tensor,
    where: Tensor,
    temperature: float = 0.1,
    block: int = 8000,
) -> Tensor:
    """Compute the contrast of feature vectors with their partner and with all vectors of other classes.

    The loss of DCC (Lai et al., CVPR 2021, section 3.3) for one direction: with s = ``anchor . vector / temperature``,
    ``-log(exp(s(positive)) / (exp(s(positive)) + sum of exp(s(negative)) over the negatives of another class))``.
    Gradients flow to the anchors only.

    Args:
        anchors: ``(N, D)`` floats, of length 1.
        positives: ``(N, D)`` floats, the partner of each anchor.
        negatives: ``(M, D)`` floats.
        labels: ``(N,)`` integers, the class of each anchor.
        negative_labels: ``(M,)`` integers; negatives whose label is below 0 do not count.
        where: ``(N,)`` bool, the anchors that count.
        temperature: above 0; smaller ones give the nearest negatives more weight.
        block: number of negatives that are compared at a time. The similarities of a block are computed again in the
            backward pass, so that memory is ``N * block``; it does not change the result.

    Returns:
        Scalar: the mean over the anchors of all processes that count; 0 if there are none. Computed in float32.

    Raises:
        ValueError: if the shapes do not match, or ``temperature`` or ``block`` is not above 0.

    Example:
        >>> x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> options = {"labels": torch.tensor([0]), "where": torch.tensor([True]), "temperature": 1.0}
        >>> directional_contrast(x, x, y, negative_labels=torch.tensor([1]), **options)  # log(1 + 1 / e)
        tensor(0.3133)
        >>> directional_contrast(x, x, y, negative_labels=torch.tensor([0]), **options)
        tensor(0.)
    """
    rows, others = anchors.shape[:1], negatives.shape[:1]
    if (
        anchors.ndim != 2
        or anchors.shape != positives.shape
        or negatives.shape[1:] != anchors.shape[1:]
        or (labels.shape, where.shape, negative_labels.shape) != (rows, rows, others)
    ):
        raise ValueError(
            f"anchors have shape {tuple(anchors.shape)}, positives {tuple(positives.shape)}, negatives "
            f"{tuple(negatives.shape)}, labels {tuple(labels.shape)}, negative_labels {tuple(negative_labels.shape)} "
            f"and where {tuple(where.shape)}; expected (N, D), (N, D), (M, D), (N,), (M,) and (N,)"
        )
    if not temperature > 0 or block < 1:
        raise ValueError(f"temperature is {temperature} and block {block}; expected both above 0")
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, positives, negatives = anchors.float(), positives.detach().float(), negatives.detach().float()
        positive = (anchors * positives).sum(1) / temperature
        total = positive
        for start in range(0, len(negatives), block):
            part = slice(start, start + block)
            other = checkpoint(
                _log_sum,
                anchors,
                negatives[part],
                labels,
                negative_labels[part],
                temperature,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            total = torch.logaddexp(total, other)
        return mean_over_processes(torch.where(where, total - positive, 0.0).sum(), where.sum())


def _log_sum(anchors: Tensor, negatives: Tensor, labels: Tensor, negative_labels: Tensor, temperature: float) -> Tensor:
    excluded = (labels[:, None] == negative_labels) | (negative_labels < 0)
    return (anchors @ negatives.T / temperature).masked_fill(excluded, _EXCLUDED).logsumexp(1)
