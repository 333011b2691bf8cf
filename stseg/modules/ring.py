"""Memory of the latest feature vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ring(nn.Module):
    """Memory of the latest feature vectors and their labels, in buffers; the oldest are replaced first.

    In a distributed training each process keeps its own: add what was gathered from all
    (:func:`stseg.distributed.all_gather_rows`), so that all hold the same.

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
    def add(self, vectors: Tensor, labels: Tensor) -> None:
        """Add vectors ``(N, width)`` and their labels ``(N,)``; of more than fit, the last ones are kept."""
        size, width = self.vectors.shape
        if vectors.shape != (len(labels), width) or labels.ndim != 1:
            raise ValueError(
                f"vectors have shape {tuple(vectors.shape)} and labels {tuple(labels.shape)}; "
                f"expected (N, {width}) and (N,)"
            )
        vectors, labels = vectors[-size:] if size else vectors[:0], labels[-size:] if size else labels[:0]
        if not len(labels):
            return
        places = (self.place + torch.arange(len(labels), device=self.place.device)) % size
        self.vectors[places] = vectors.to(self.vectors)
        self.labels[places] = labels.to(self.labels)
        self.place.copy_((self.place + len(labels)) % size)

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"size={len(self.labels)}, width={self.vectors.shape[1]}"
