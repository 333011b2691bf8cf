"""Checksums of images, which detect that the data behind the same ids have changed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stseg.data.items import Items
from stseg.inference.reading import Skipped, read_items


def checksum(tensor: Tensor) -> int:
    """Compute a checksum of shape and values."""
    return zlib.crc32(tensor.cpu().contiguous().numpy().tobytes(), zlib.crc32(str(tuple(tensor.shape)).encode()))


def image_checksums(items: Items, *, most: int = 8) -> dict[str, int]:
    """Compute the checksums of at most ``most`` evenly spaced images, by id."""
    chosen = sorted({len(items) * k // most for k in range(most)}) if len(items) else []
    unreadable: list[Skipped] = []
    return {items.ids[index]: checksum(image) for index, image in read_items(items, chosen, skip=unreadable.append)}


def dataset_fingerprint(items: Items, *, most: int = 256) -> str:
    """Describe a data set by length, ids and the pixels of at most ``most`` evenly spaced images."""
    return join_checksums(items.ids, list(image_checksums(items, most=most).items()))


def join_checksums(ids: Sequence[str], checksums: Sequence[Any]) -> str:
    """Describe a data set by its ids and some checksums, in any order."""
    return f"{len(ids)} items, {zlib.crc32(repr((list(ids), sorted(checksums))).encode()):08x}"
