"""Splits into labeled and unlabeled images: from id files, or random."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from stseg.data._reading import numbered_lines
from stseg.data.items import duplicate
from stseg.errors import DataError


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


def split_ids(ids: Sequence[str], labeled: float | int = 1 / 8, seed: int = 0) -> tuple[list[str], list[str]]:
    """Split ids at random into labeled and unlabeled ones.

    The result depends on the set of ids and on the seed, not on the order of the ids. For the same seed, a
    smaller labeled set is a subset of a larger one.

    Args:
        ids: all ids.
        labeled: how many to draw: a share in (0, 1), rounded up to whole images, or a number of images.
        seed: seed of the draw.

    Returns:
        The labeled and the unlabeled ids, each in the order of ``ids``.

    Raises:
        DataError: if there is no id, or an id occurs twice.
        ValueError: if either part would be empty.

    Example:
        >>> labeled, unlabeled = split_ids([f"{i:03d}" for i in range(100)], labeled=1 / 8)
        >>> len(labeled), len(unlabeled)
        (13, 87)
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
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).tolist()
    by_name = sorted(ids)
    drawn = {by_name[position] for position in order[:count]}
    return [id for id in ids if id in drawn], [id for id in ids if id not in drawn]


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
