"""Uniform access to the items of any data set: length, names, images and masks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from stseg.data.convert import image_of, pair_of
from stseg.data.decoding import pixel_limit_error
from stseg.errors import DataError, StsegError


class Items(Dataset[Any]):
    """Wrapper of a map-style data set that resolves length and names once.

    The ids are ``dataset.ids`` where present; for a ``Subset`` or ``ConcatDataset``, those of the underlying data
    sets; otherwise ``"0"``, ``"1"``, ...

    Args:
        dataset: any map-style data set.

    Attributes:
        dataset: the data set.
        names: names of the items in messages: the ids, or ``dataset.item_names`` (of a data set that repeats items,
            whose names are not unique).
        has_ids: whether the items have ids of their own. Numbers do not count, even those of an
            underlying data set: equal numbers do not mean equal images.
        concurrent: whether another thread may read the items, and gets the same ones whatever the random generators do:
            the attribute ``concurrent`` of its class, True of :class:`stseg.data.SegmentationFolder` and
            :class:`stseg.data.ListedFiles`. Subclasses say so themselves.

    Raises:
        TypeError: if it is no map-style data set: it has no length or no index, or is a stream, a loader, a path or a
            list of paths; names the way to one.
        DataError: if the number of names is not the number of items.

    Example:
        >>> items = Items([object(), object(), object()])
        >>> len(items), items.ids, items.subset([2]).ids
        (3, ['0', '1', '2'], ['2'])
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        _refuse_others(dataset)
        self.dataset = dataset
        length = _length(dataset)
        ids = _names(dataset, "ids")
        self._ids = [str(index) for index in range(length)] if ids is None else ids
        names = _names(dataset, "item_names", "ids")
        self.names = self._ids if names is None or names == ids else names
        for found in (self._ids, self.names):
            if len(found) != length:
                raise DataError(f"the data set has {length} items but {len(found)} ids")
        self.has_ids = _has_ids(dataset)
        self.concurrent = _is_concurrent(dataset)
        self._indices: Sequence[int] = range(length)
        self._only_images = False

    @classmethod
    def of(cls, dataset: Dataset[Any]) -> Items:
        """Wrap a data set, unless it is wrapped already."""
        return dataset if isinstance(dataset, Items) else cls(dataset)

    @cached_property
    def ids(self) -> list[str]:
        """The ids of the items.

        Raises:
            DataError: if one occurs twice.
        """
        if (twice := duplicate(self._ids)) is not None:
            raise DataError(f"the id {twice!r} occurs more than once in the data set; ids must be unique")
        return self._ids

    def subset(self, indices: Sequence[int], *, only_images: bool = False) -> Items:
        """Return some of the items under their names; with ``only_images``, without masks."""
        part = object.__new__(Items)
        part.dataset, part.has_ids, part.concurrent = self.dataset, self.has_ids, self.concurrent
        part._ids = [self._ids[index] for index in indices]
        part.names = part._ids if self.names is self._ids else [self.names[index] for index in indices]
        part._indices = [self._indices[index] for index in indices]
        part._only_images = only_images or self._only_images
        return part

    def image(self, index: int) -> Tensor:
        """Return an item's image, ``(C, H, W)`` uint8 or float32 in [0, 1]."""
        return image_of(self._item(index), name=self.names[index])

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an item's image and its mask, ``(H, W)`` uint8 or int32."""
        return pair_of(self[index], name=self.names[index])

    def __len__(self) -> int:
        return len(self._indices)

    def _item(self, index: int) -> Any:
        name = self.names[index]
        try:
            return self.dataset[self._indices[index]]
        except (StsegError, OSError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise pixel_limit_error(f"item {name!r}", error) from error
        except Exception as error:  # of any type; a StopIteration would end the loop over the items as if it were done
            raise DataError(f"item {name!r} cannot be read: {type(error).__name__}: {error}") from error

    def __getitem__(self, index: int) -> Any:
        return self.image(index) if self._only_images else self._item(index)


def _refuse_others(dataset: Any) -> None:
    if isinstance(dataset, (str, bytes, os.PathLike)):
        raise TypeError(
            f"the data set is {dataset!r}; expected a data set: "
            f"stseg.data.SegmentationFolder({_path(dataset)!r}) makes one of a folder of images"
        )
    if isinstance(dataset, DataLoader):
        raise TypeError(
            "expected a data set, got a DataLoader; its .dataset is one, if it is map-style: with __len__ and "
            "__getitem__ (batch_size, num_workers and augmentation are settings of stseg.TrainConfig)"
        )
    if isinstance(dataset, Mapping) and 0 not in dataset:
        raise TypeError(
            f"the data set is a {type(dataset).__name__} with the keys {sorted(map(str, dataset))}; expected a list of "
            "items: list(zip(images, masks)), or [{'image': image, 'mask': mask}, ...]"
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"expected a map-style data set with a length, got {type(dataset).__name__}; list(dataset) makes one if "
            "the items fit in memory, else write a class with __len__ and __getitem__"
        )
    if type(dataset) in (list, tuple) and dataset:
        _refuse_paths(dataset)


def _refuse_paths(dataset: Sequence[Any]) -> None:
    first = dataset[0]
    if isinstance(first, (str, os.PathLike)):
        raise TypeError(
            f"the data set is a list of paths, which begins with {_path(first)!r}; expected a data set: "
            "stseg.data.ListedFiles(root, paths, masks=False) makes one of images, "
            "stseg.data.SegmentationFolder(folder) one of all images in a folder"
        )
    if isinstance(first, (list, tuple)) and first and isinstance(first[0], (str, os.PathLike)):
        raise TypeError(
            f"the data set is a list of paths, which begins with {tuple(map(_path, first))!r}; expected a data set: "
            "stseg.data.ListedFiles(root, pairs) makes one of images and masks, "
            "stseg.data.SegmentationFolder(images, masks) one of two folders"
        )


def _path(path: Any) -> Any:
    return str(path) if isinstance(path, (str, os.PathLike)) else path


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        raise TypeError(f"expected a map-style data set with a length, got {type(dataset).__name__}") from None


def _names(dataset: Any, *attributes: str) -> list[str] | None:
    if isinstance(dataset, Items):
        return dataset.names if "item_names" in attributes else dataset._ids
    for attribute in attributes:
        own = getattr(dataset, attribute, None)
        if own is not None and not callable(own):
            return [str(name) for name in own]
    if isinstance(dataset, Subset):
        inner = _names(dataset.dataset, *attributes)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [_names(part, *attributes) for part in dataset.datasets]
        return None if None in parts else [name for part in parts for name in part or ()]
    return None


def _has_ids(dataset: Any) -> bool:
    if isinstance(dataset, Items):
        return dataset.has_ids
    if isinstance(dataset, ConcatDataset):
        return all(_has_ids(part) for part in dataset.datasets)
    ids, source = _names(dataset, "ids"), getattr(dataset, "dataset", None)
    if ids is None or source is None or _has_ids(source):
        return ids is not None
    return not all(id.isdecimal() for id in ids)


def _is_concurrent(dataset: Any) -> bool:
    if isinstance(dataset, ConcatDataset):
        return all(map(_is_concurrent, dataset.datasets))
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    return _is_concurrent(inner) if inner is not dataset else vars(type(dataset)).get("concurrent") is True


def duplicate(ids: Sequence[str]) -> str | None:
    """Return the first of ``ids`` that repeats an earlier one; None if there is none."""
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            return id
        seen.add(id)
    return None


def shared(ids: Sequence[str], others: Sequence[str]) -> str | None:
    """Return the first of ``ids`` that is also in ``others``; None if there is none."""
    known = set(others)
    return next((id for id in ids if id in known), None)
