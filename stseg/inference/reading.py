"""Items of a data set in order, read ahead by workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from stseg.data.items import Items
from stseg.errors import UnreadableImageError
from stseg.seeds import derive_seed, fixed_seed


@dataclass(frozen=True)
class Skipped:
    """An item that could not be read and was left out on request."""

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
) -> Iterator[tuple[int, Any]]:
    """Yield index and image of some items, or ``(image, mask)``.

    Args:
        items: the data set.
        indices: which of its items.
        batch_size: how many a worker returns at once.
        num_workers: processes that read; 0 reads in this one.
        with_mask: whether to yield ``(image, mask)`` instead of the image.
        skip: called with what cannot be read; without it that is an error.

    Raises:
        UnreadableImageError: if an item cannot be read and ``skip`` is None.
    """
    loader = DataLoader(
        _Parts(items, indices, with_mask),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # of its own, or it would advance the caller's
    )
    for batch in loader:
        for index, value in batch:
            if not isinstance(value, _Unreadable):
                parts = tuple(torch.from_numpy(part) for part in value)
                yield index, parts if with_mask else parts[0]
            elif skip is None:
                raise value.error
            else:
                skip(Skipped(index, items.ids[index], str(value.error)))


@dataclass(frozen=True)
class _Unreadable:
    error: Exception


class _Parts(Dataset[Any]):
    """Index and parts of an item."""

    def __init__(self, items: Items, indices: Sequence[int], with_mask: bool) -> None:
        self.items, self.indices, self.with_mask = items, indices, with_mask

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Any]:
        index = self.indices[position]
        try:
            with fixed_seed(derive_seed(0, "read", index)):  # a data set that augments gives the same every time
                parts = self.items.pair(index) if self.with_mask else (self.items.image(index),)
        except OSError as error:  # returned, not raised: a worker would wrap it in its own traceback
            name = self.items.names[index]
            text = str(error) if isinstance(error, UnreadableImageError) else f"item {name!r}: {error}"
            return index, _Unreadable(UnreadableImageError(text))
        # A tensor from a worker holds a file descriptor as long as it lives, an array does not.
        return index, tuple(part.cpu().numpy() for part in parts)
