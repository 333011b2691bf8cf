"""The items of a data set: how many there are, and their ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Dataset, Subset

from stseg.errors import DataError


def ids_of(dataset: Dataset[Any]) -> list[str]:
    """The ids of a data set's items, in order.

    ``dataset.ids`` where there is one; a ``Subset`` or ``ConcatDataset`` asks the data sets it is made of;
    everything else is numbered ``"0"``, ``"1"``, ...

    Raises:
        DataError: if ``ids`` and the data set differ in length, or an id occurs twice.

    Example:
        >>> ids_of([object(), object()])
        ['0', '1']
    """
    ids = _named(dataset, "ids")
    twice = duplicate(ids)
    if twice is not None:
        raise DataError(f"the id {twice!r} occurs more than once in the data set; ids must be unique")
    return ids


def names_of(dataset: Dataset[Any]) -> list[str]:
    """What error messages call the items: like the ids, but several may be called the same.

    ``dataset.item_names`` where there is one (a data set that repeats items has no unique ids), else as in
    ``ids_of``.

    Raises:
        DataError: if the names and the data set differ in length.
    """
    return _named(dataset, "item_names", "ids")


def has_ids(dataset: Dataset[Any]) -> bool:
    """Whether the items have names of their own.

    Otherwise they are numbered, and so are those of a data set made from them (which it holds as
    ``.dataset``): equal ids do not mean equal images then.
    """
    if isinstance(dataset, ConcatDataset):
        return all(has_ids(part) for part in dataset.datasets)
    ids, source = _find(dataset, "ids"), getattr(dataset, "dataset", None)
    if ids is None or source is None or has_ids(source):
        return ids is not None
    return not all(id.isdecimal() for id in ids)


def _named(dataset: Dataset[Any], *attributes: str) -> list[str]:
    length = len_of(dataset)
    names = _find(dataset, *attributes)
    if names is None:
        return [str(index) for index in range(length)]
    if len(names) != length:
        raise DataError(f"the data set has {length} items but {len(names)} ids")
    return names


def _find(dataset: Any, *attributes: str) -> list[str] | None:
    for attribute in attributes:
        own = getattr(dataset, attribute, None)
        if own is not None and not callable(own):
            return [str(name) for name in own]
    if isinstance(dataset, Subset):
        inner = _find(dataset.dataset, *attributes)
        return None if inner is None else [inner[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        names: list[str] = []
        for part in dataset.datasets:
            found = _find(part, *attributes)
            if found is None:
                return None
            names += found
        return names
    return None


def len_of(dataset: Dataset[Any]) -> int:
    """Length of a map-style data set.

    Raises:
        TypeError: if it has no length (an ``IterableDataset``, or not a data set at all).
    """
    try:
        return len(dataset)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        raise TypeError(f"expected a map-style data set with a length, got {type(dataset).__name__}") from None


def duplicate(ids: Sequence[str]) -> str | None:
    """The first of ``ids`` that has occurred before."""
    seen: set[str] = set()
    for id in ids:
        if id in seen:
            return id
        seen.add(id)
    return None


def repeated(ids: Sequence[str], others: Sequence[str]) -> str | None:
    """The first of ``ids`` that also stands in ``others``."""
    known = set(others)
    return next((i for i in ids if i in known), None)
