"""Checksums of images, which detect that the data behind the same ids have changed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from stseg.data.items import Items
from stseg.errors import DataError, UnreadableImageError
from stseg.inference.reading import Skipped, read_items
from stseg.seeds import derive_seed, fixed_seed


def checksum(tensor: Tensor) -> int:
    """Compute a checksum of shape and values."""
    return zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), zlib.crc32(str(tuple(tensor.shape)).encode()))


def image_checksums(items: Items, *, most: int = 8, with_mask: bool = False) -> dict[str, int]:
    """Compute the checksums of at most ``most`` evenly spaced images, or images and masks, by id."""
    chosen = sorted({len(items) * k // most for k in range(most)}) if len(items) else []
    unreadable: list[Skipped] = []
    found = read_items(items, chosen, with_mask=with_mask, skip=unreadable.append)
    if with_mask:
        return {items.ids[index]: checksum(image) ^ checksum(mask) for index, (image, mask) in found}
    return {items.ids[index]: checksum(image) for index, image in found}


def dataset_fingerprint(items: Items, *, most: int = 256, with_mask: bool = False) -> str:
    """Describe a data set by length, ids and the pixels of at most ``most`` evenly spaced images, or pairs."""
    return join_checksums(items.ids, list(image_checksums(items, most=most, with_mask=with_mask).items()))


def join_checksums(ids: Sequence[str], checksums: Sequence[Any]) -> str:
    """Describe a data set by its ids and some checksums, in any order."""
    return f"{len(ids)} items, {zlib.crc32(repr((list(ids), sorted(checksums))).encode()):08x}"


def item_count(description: str) -> int:
    """Return the number of items in a description by :func:`join_checksums`.

    Example:
        >>> item_count(join_checksums(["a", "b"], []))
        2
    """
    return int(description.split(" ", 1)[0])


def check_repeatable(items: Items, *, name: str, with_mask: bool = False) -> None:
    """Read some evenly spaced items several times, with different states of the random generators.

    Pseudo-masks would belong to other images than those that are trained on, and a resumed run would see other data.

    Raises:
        DataError: if an item changes from one reading to the next; names it.
    """
    chosen = sorted({len(items) * k // 16 for k in range(16)}) if len(items) else []
    for index in chosen:
        readings = set()
        for reading in range(max(2, 32 // len(chosen))):  # 32 or more in all
            with fixed_seed(derive_seed(0, "read again", index, reading)), suppress(UnreadableImageError, OSError):
                parts = items.pair(index) if with_mask else (items.image(index),)
                readings.add(tuple(checksum(part) for part in parts))
        if len(readings) > 1:
            raise DataError(
                f"item {items.names[index]!r} of the {name} data set changes from one reading to the next; expected "
                "data sets without random augmentation, which belongs in the training: TrainConfig(weak=...), and "
                "strong= of methods"
            )
