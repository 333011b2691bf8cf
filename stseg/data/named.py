"""Data sets whose items have ids: parts and sums of them keep the ids."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TypeVar

from torch.utils.data import ConcatDataset, Dataset, Subset

from stseg.data._names import nearest
from stseg.data.items import Items, duplicate, shared
from stseg.errors import DataError

T_co = TypeVar("T_co", covariant=True)


class NamedDataset(Dataset[T_co]):
    """Base class of map-style data sets with ids: it adds :meth:`only`, :meth:`without` and ``+``, which keep the ids.

    The data sets of :mod:`stseg.data` and :class:`stseg.PseudoLabeled` are such; a data set of your own becomes one if
    it inherits from this class instead of ``torch.utils.data.Dataset`` and has an attribute ``ids``.

    The sum of two data sets, ``first + second``, holds the items of both. Its ids are those of its parts, if both have
    them; else items are numbered. The second one may be any map-style data set.

    Attributes:
        ids: name of each item.

    Raises:
        DataError: from ``+``, if an id is in both data sets.
        TypeError: from ``+``, if the other is not a map-style data set.

    Example:
        >>> from stseg.data import SyntheticScenes
        >>> scenes = SyntheticScenes(4, seed=0)
        >>> labeled = scenes.only(["scene_0_00003", "scene_0_00001"])
        >>> labeled.ids
        ['scene_0_00003', 'scene_0_00001']
        >>> unlabeled = scenes.without(labeled.ids)
        >>> unlabeled.ids
        ['scene_0_00000', 'scene_0_00002']
        >>> (labeled + unlabeled).ids
        ['scene_0_00003', 'scene_0_00001', 'scene_0_00000', 'scene_0_00002']
    """

    ids: list[str]

    def only(self, ids: Iterable[str]) -> NamedSubset[T_co]:
        """Return the items with these ids, in this order.

        Raises:
            DataError: if ``ids`` is empty, one is that of no item, or one occurs twice; names it and the nearest id.
            TypeError: if ``ids`` is a string, a path or a data set.
        """
        chosen = self._known(ids)
        if not chosen:
            raise DataError("ids is empty; expected one or more")
        if (twice := duplicate(chosen)) is not None:
            raise DataError(f"the id {twice!r} occurs more than once in ids; ids must be unique")
        return NamedSubset(self, chosen)

    def without(self, ids: Iterable[str]) -> NamedSubset[T_co]:
        """Return the items with other ids than these, in their order.

        Raises:
            DataError: if no item is left, or one of ``ids`` is that of no item; names it and the nearest id.
            TypeError: if ``ids`` is a string, a path or a data set.
        """
        excluded = set(self._known(ids))
        left = [id for id in Items.of(self).ids if id not in excluded]
        if not left:
            raise DataError(f"ids names every item of {self!r}; expected one or more others")
        return NamedSubset(self, left)

    def __add__(self, other: Dataset[Any]) -> NamedSum[Any]:
        return NamedSum(self, other)

    def _known(self, ids: Iterable[str]) -> list[str]:
        check_ids("ids", ids)
        ids, there = list(ids), set(Items.of(self).ids)
        unknown = [id for id in ids if id not in there]
        if unknown:
            some = ", ".join(map(repr, unknown[:3])) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            hint = nearest(unknown[0], there - {*ids}) if isinstance(unknown[0], str) else "; ids are strings"
            raise DataError(f"there is no item with the id {some} in {self!r} ({len(unknown)} of {len(ids)}){hint}")
        return ids


class NamedSubset(Subset[T_co], NamedDataset[T_co]):
    """Items of a data set that are chosen by their ids, the result of ``only`` and ``without``."""

    def __init__(self, dataset: NamedDataset[T_co], ids: list[str]) -> None:
        indices = {id: index for index, id in enumerate(Items.of(dataset).ids)}
        super().__init__(dataset, [indices[id] for id in ids])
        self.ids = ids

    def __repr__(self) -> str:
        return f"{len(self)} of {self.dataset!r}"


class NamedSum(ConcatDataset[T_co], NamedDataset[T_co]):
    """Items of one data set, then those of another, the result of ``+``."""

    def __init__(self, first: NamedDataset[T_co], second: Dataset[T_co]) -> None:
        both = Items.of(first), Items.of(second)
        if all(items.has_ids for items in both):
            ids = [items.ids for items in both]
            if (common := shared(*ids)) is not None:
                count = len({*ids[0]} & {*ids[1]})
                raise DataError(
                    f"the id {common!r} is in both data sets, {first!r} and {second!r} ({count} ids in all); expected "
                    "each image in one of them: first + second.without({*first.ids} & {*second.ids}), or, if they are "
                    "different images, other ids, such as those that id_prefix= of stseg.data.SegmentationFolder makes"
                )
            self.ids = ids[0] + ids[1]
        else:
            self.ids = [str(index) for index in range(sum(map(len, both)))]
        super().__init__([first, second])

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.datasets))


def check_ids(argument: str, ids: Any) -> None:
    """Raise a ``TypeError`` unless ``ids`` can be a sequence of ids; its message calls it ``argument``."""
    if isinstance(ids, (str, os.PathLike)):
        raise TypeError(f"{argument} is {ids!r}; expected a sequence of ids (stseg.data.read_ids reads a file of them)")
    if hasattr(ids, "ids"):
        raise TypeError(f"{argument} is a {type(ids).__name__}; expected its ids: {argument}=dataset.ids")
    if not isinstance(ids, Iterable):
        raise TypeError(f"{argument} is {ids!r}; expected a sequence of ids")
