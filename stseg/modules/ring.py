"""Memory of the latest feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ring(nn.Module):
    """Memory of the latest feature vectors and their labels, in buffers; the oldest are replaced first.

    In a distributed training each process keeps its own: add what was gathered from all
    (:func:`stseg.distributed.all_gather_batch`), so that all hold the same.

    Args:
        size: number of vectors, 0 or more.
        width: length of a vector.

    Raises:
        ValueError: if ``size`` is negative or ``width`` is not positive.

    Example:
        >>> ring = Ring(3, width=1)
        >>> ring.add(torch.tensor([[1.0], [2.0]]), torch.tensor([0, 1]))
        >>> ring.add(torch.tensor([[3.0], [4.0]]), torch.tensor([0, 1]))
        >>> ring.vectors[:, 0].tolist(), ring.labels.tolist()
        ([4.0, 2.0, 3.0], [1, 1, 0])
    """

    vectors: Tensor
    """``(size, width)`` float32, in no particular order; 0 where nothing was added yet."""
    labels: Tensor
    """``(size,)`` int64; -1 where nothing was added yet."""
    place: Tensor
    """int64 scalar: where the next vector goes."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        if not isinstance(size, int) or size < 0 or not isinstance(width, int) or width < 1:
            raise ValueError(f"size is {size!r} and width {width!r}; expected integers, 0 or more and 1 or more")
        self.register_buffer("vectors", torch.zeros(size, width))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def add(self, vectors: Tensor, labels: Tensor, *, where: Tensor | None = None) -> None:
        """Add vectors, without synchronizing with the device.

        Args:
            vectors: ``(N, width)`` floats; of more than fit, the last ones are kept.
            labels: ``(N,)`` integers.
            where: ``(N,)`` bool, the vectors to add; None for all.

        Raises:
            ValueError: if the shapes do not match.
        """
        size, width = self.vectors.shape
        rows = labels.shape
        if labels.ndim != 1 or vectors.shape != (*rows, width) or (where is not None and where.shape != rows):
            came = "" if where is None else f" and where {tuple(where.shape)}"
            raise ValueError(
                f"vectors have shape {tuple(vectors.shape)}, labels {tuple(labels.shape)}{came}; "
                f"expected (N, {width}) and (N,)"
            )
        count = min(len(labels), size)
        if not count:
            return
        # Vectors that are not added go to the front, and stay what the memory holds in their places.
        wanted = torch.ones_like(labels, dtype=torch.bool) if where is None else where
        last = wanted.byte().argsort(stable=True)[-count:]
        wanted, vectors, labels = wanted[last], vectors[last].to(self.vectors), labels[last].to(self.labels)
        end = self.place + wanted.sum()
        places = (end - count + torch.arange(count, device=end.device)) % size
        self.vectors[places] = torch.where(wanted[:, None], vectors, self.vectors[places])
        self.labels[places] = torch.where(wanted, labels, self.labels[places])
        self.place.copy_(end % size)

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"size={len(self.labels)}, width={self.vectors.shape[1]}"
