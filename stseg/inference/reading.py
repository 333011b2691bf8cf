"""Reading of the items of a data set in order, prefetched by workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from stseg.data.items import Items
from stseg.data.observations import Observations, observing
from stseg.errors import DataError, StsegError, UnreadableImageError
from stseg.seeds import derive_seed, fixed_seed

T = TypeVar("T")


@dataclass(frozen=True)
class Skipped:
    """Item that could not be read and was skipped."""

    index: int
    id: str
    reason: str


def read_items(
    items: Items,
    indices: Sequence[int],
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    with_mask: bool = False,
    skip: Callable[[Skipped], object] | None = None,
    observations: Observations | None = None,
) -> Iterator[tuple[int, Any]]:
    """Yield index and image of some items, or ``(image, mask)``.

    Args:
        items: the data set.
        indices: indices of the items to read.
        batch_size: how many items a worker returns at once.
        num_workers: worker processes; 0 reads in this process.
        with_mask: whether to yield ``(image, mask)`` instead of the image.
        skip: called with each item that cannot be read; None raises an error instead.
        observations: what reading the items shows is added to it.

    Raises:
        UnreadableImageError: if an item cannot be read and ``skip`` is None.
    """
    loader = DataLoader(
        _Parts(items, indices, with_mask, observations is not None),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # its own, so as not to advance the caller's
    )
    count = 0
    for batch in loader:
        for index, value, seen in batch:
            count += 1
            if observations is not None and seen is not None:
                observations.add(seen)
            if isinstance(value, StsegError):
                raise value
            if not isinstance(value, _Unreadable):
                parts = tuple(torch.from_numpy(part) for part in value)
                yield index, parts if with_mask else parts[0]
            elif skip is None:
                raise value.error
            else:
                skip(Skipped(index, items.ids[index], str(value.error)))
    if count != len(indices):
        raise DataError(f"{count} of {len(indices)} items were read; expected all of them")


def read_ahead(values: Iterator[T], count: int) -> Iterator[T]:
    """Yield the values of an iterator, of which a thread computes the next ``count`` meanwhile.

    Example:
        >>> list(read_ahead(iter("abc"), 2))
        ['a', 'b', 'c']
    """
    end = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, values, end) for _ in range(count))
        try:
            while (value := waiting.popleft().result()) is not end:
                waiting.append(thread.submit(next, values, end))
                yield cast("T", value)
        finally:
            for job in waiting:
                job.cancel()


@dataclass(frozen=True)
class _Unreadable:
    error: Exception


class _Parts(Dataset[Any]):
    """Index and parts of an item."""

    def __init__(self, items: Items, indices: Sequence[int], with_mask: bool, observed: bool) -> None:
        self.items, self.indices, self.with_mask, self.observed = items, indices, with_mask, observed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Any, Observations | None]:
        index = self.indices[position]
        with observing() as seen:
            value = self._read(index)
        return index, value, seen if self.observed else None

    def _read(self, index: int) -> tuple[np.ndarray[Any, Any], ...] | _Unreadable | StsegError:
        """Return the parts of an item, or its error: if raised, a worker would wrap it in its own traceback."""
        try:
            # Makes data sets that augment deterministic; the state of the generators is that of all threads.
            with nullcontext() if self.items.concurrent else fixed_seed(derive_seed(0, "read", index)):
                parts = self.items.pair(index) if self.with_mask else (self.items.image(index),)
        except OSError as error:
            name = self.items.names[index]
            text = str(error) if isinstance(error, UnreadableImageError) else f"item {name!r}: {error}"
            return _Unreadable(UnreadableImageError(text))
        except StsegError as error:
            return error
        # A tensor from a worker keeps a file descriptor open for its lifetime; an array does not.
        return tuple(part.cpu().numpy() for part in parts)
