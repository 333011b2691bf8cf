"""Splits into labeled and unlabeled images: from id files, or random, of single images or of whole groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from stseg.data._names import nearest
from stseg.data._reading import numbered_lines
from stseg.data.items import duplicate
from stseg.errors import DataError

T = TypeVar("T")


def read_ids(path: str | Path) -> list[str]:
    r"""Read a file of ids, one per line; empty lines and white space around the ids are ignored.

    Args:
        path: a text file in UTF-8.

    Raises:
        DataError: if there is no id, an id occurs twice, or the file is not UTF-8; names the line.
        OSError: if there is no such file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labeled.txt"
        >>> _ = path.write_text("scene/0001\nscene/0002\n")
        >>> read_ids(path)
        ['scene/0001', 'scene/0002']
    """
    lines: dict[str, int] = {}
    for number, line in numbered_lines(path):
        id = line.strip()
        if id in lines:
            raise DataError(f"{path}, line {number}: the id {id!r} is in line {lines[id]} already")
        lines[id] = number
    if not lines:
        raise DataError(f"{path} holds no id; expected one a line")
    return list(lines)


def split_ids(
    ids: Sequence[str],
    labeled: float | int = 1 / 8,
    seed: int = 0,
    *,
    groups: Mapping[str, Any] | Callable[[str], Any] | None = None,
) -> tuple[list[str], list[str]]:
    """Split ids at random into labeled and unlabeled ones.

    The result depends on the set of ids, their groups and the seed, not on the order of the ids. For the same seed, a
    smaller labeled set is a subset of a larger one, unless there are ``groups``.

    With ``groups``, such as the patients or the scenes that the images are of, all images of a group go to the same
    side. The smaller side is drawn, the labeled one for shares up to a half: from the groups in random order, each that
    brings the number of images on that side nearer to the one asked for. If none does, as all are too large, it is the
    smallest group.

    Args:
        ids: all ids.
        labeled: how many to draw: a share in (0, 1), rounded up to whole images, or a number of images.
        seed: seed of the draw.
        groups: the group of each id, as a mapping or as a function of an id: any hashable values.

    Returns:
        The labeled and the unlabeled ids, each in the order of ``ids``.

    Raises:
        DataError: if there is no id, an id occurs twice or has no group, or all are of one group.
        TypeError: if ``ids`` is a string, or ``groups`` is neither a mapping nor a function.
        ValueError: if either part would be empty.

    Example:
        >>> labeled, unlabeled = split_ids([f"{i:03d}" for i in range(100)], labeled=1 / 8)
        >>> len(labeled), len(unlabeled)
        (13, 87)
        >>> ids = ["ann/0", "ann/1", "bob/0", "bob/1", "cyd/0", "cyd/1"]
        >>> split_ids(ids, labeled=2, groups=lambda id: id.split("/")[0])
        (['cyd/0', 'cyd/1'], ['ann/0', 'ann/1', 'bob/0', 'bob/1'])
    """
    if isinstance(ids, str):
        raise TypeError(f"ids is the string {ids!r}; expected a sequence of ids (read_ids reads a file of them)")
    ids = list(ids)
    twice = duplicate(ids)
    if twice is not None:
        raise DataError(f"the id {twice!r} occurs more than once; ids must be unique")
    if not ids:
        raise DataError("there are no ids to split")
    count = _count(labeled, len(ids))
    if groups is None:
        drawn = set(_shuffle(sorted(ids), seed)[:count])
    elif 2 * count <= len(ids):
        drawn = _draw(_shuffle(_units(ids, groups), seed), count)
    else:
        drawn = set(ids) - _draw(_shuffle(_units(ids, groups), seed), len(ids) - count)
    return [id for id in ids if id in drawn], [id for id in ids if id not in drawn]


def _shuffle(things: list[T], seed: int) -> list[T]:
    order = torch.randperm(len(things), generator=torch.Generator().manual_seed(seed))
    return [things[position] for position in order.tolist()]


def _units(ids: list[str], groups: Mapping[str, Any] | Callable[[str], Any]) -> list[list[str]]:
    """Return the ids of each group, sorted, the groups by their first id."""
    units: dict[Any, list[str]] = {}
    for id, group in zip(sorted(ids), _groups_of(sorted(ids), groups), strict=True):
        units.setdefault(group, []).append(id)
    if len(units) < 2:
        raise DataError(f"all {len(ids)} ids are of the group {next(iter(units))!r}; expected two groups or more")
    return list(units.values())


def _groups_of(ids: list[str], groups: Any) -> list[Any]:
    if isinstance(groups, Mapping):
        missing = [id for id in ids if id not in groups]
        if missing:
            near = nearest(missing[0], [str(id) for id in groups])
            raise DataError(f"groups lacks the id {missing[0]!r} ({len(missing)} of {len(ids)}){near}")
        found = [groups[id] for id in ids]
    elif callable(groups):
        found = [groups(id) for id in ids]
    else:
        raise TypeError(
            f"groups is a {type(groups).__name__}; expected a mapping or a function from an id to its group: "
            "dict(zip(ids, groups)) of two lists, series.to_dict() of a pandas series"
        )
    for id, group in zip(ids, found, strict=True):
        if not isinstance(group, Hashable) or isinstance(group, torch.Tensor):  # tensors are hashed by identity
            raise TypeError(f"the group of {id!r} is {group!r}; expected a name or a number for each id")
        if group is None or group != group:  # NaN, as an empty cell of a table is
            raise DataError(f"the group of {id!r} is {group!r}; expected a name or a number for each id")
    return found


def _draw(units: list[list[str]], count: int) -> set[str]:
    """Take, in order, the units that bring the number of ids nearer to ``count``."""
    drawn: set[str] = set()
    for unit in units:
        if abs(len(drawn) + len(unit) - count) < count - len(drawn):
            drawn.update(unit)
    smallest = min(units, key=len)
    return drawn or set(smallest)


def _count(labeled: float | int, total: int) -> int:
    if isinstance(labeled, bool) or not isinstance(labeled, (int, float)):
        raise TypeError(f"labeled is {labeled!r}; expected a share in (0, 1) or a number of images")
    if isinstance(labeled, int):
        count = labeled
    elif 0 < labeled < 1:
        count = max(1, math.ceil(labeled * total - 1e-9))  # 0.1 * 30 is a little more than 3
    else:
        raise ValueError(f"labeled is {labeled}; expected a share in (0, 1), or a number of images as an int")
    if not 0 < count < total:
        raise ValueError(f"labeled is {labeled}, {count} of {total} ids; expected one or more on either side")
    return count
