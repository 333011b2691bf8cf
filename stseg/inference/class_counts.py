"""Pixels of each class in a labeled data set, and what they say about it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stseg.data.observations import warn
from stseg.distributed import all_gather, rank
from stseg.errors import DataError, StsegError
from stseg.inference.mask_store import MaskStore
from stseg.progress import show_message

_SHOWN = 32  # classes of a table
_MOST_COUNTED = 1000  # pseudo-masks


@dataclass
class ClassCounts:
    """Number of pixels of each class.

    Args:
        num_classes: number of classes K.
        ignore_index: mask value of ignored pixels.
        name: name of the data set in messages.

    Example:
        >>> counts = ClassCounts(2)
        >>> counts.add(torch.tensor([[0, 1, 1, 255]]))
        >>> counts.pixels.tolist(), counts.ignored, counts.masks.tolist()
        ([1, 2], 1, [1, 1])
    """

    num_classes: int
    ignore_index: int = 255
    name: str = "labeled"

    def __post_init__(self) -> None:
        self.pixels = torch.zeros(self.num_classes, dtype=torch.int64)
        self.masks = torch.zeros(self.num_classes, dtype=torch.int64)
        self.ignored = 0
        self.total = 0
        # Masks that hold ignored pixels and class 0 alone, those that hold ignored pixels and other classes.
        self.only_ignored = self.with_ignored = 0

    def add(self, mask: Tensor) -> None:
        """Count the pixels of a valid mask ``(H, W)``."""
        values = mask[mask != self.ignore_index] if 0 <= self.ignore_index < 256 or mask.dtype != torch.uint8 else mask
        counts = torch.bincount(values.flatten(), minlength=self.num_classes)
        self.pixels += counts
        self.masks += counts > 0
        self.ignored += mask.numel() - values.numel()
        self.total += 1
        if mask.numel() > values.numel():
            found = counts.nonzero().flatten().tolist()
            self.only_ignored += found == [0]
            self.with_ignored += any(index > 0 for index in found)

    def merge_processes(self) -> None:
        """Add the counts of all processes."""
        parts = all_gather((self.pixels, self.masks, self.ignored, self.total, self.only_ignored, self.with_ignored))
        self.pixels, self.masks = (torch.stack([part[i] for part in parts]).sum(0) for i in (0, 1))
        self.ignored, self.total = (sum(part[i] for part in parts) for i in (2, 3))
        self.only_ignored, self.with_ignored = (sum(part[i] for part in parts) for i in (4, 5))

    def check(self, *, of_training: bool = True) -> None:
        """Refuse masks that hold one class, and warn of classes that no mask holds.

        Args:
            of_training: whether a network is to learn from the masks; a single class of a validation set is a warning.

        Raises:
            DataError: if all pixels are ignored; if all that are not have class 0 and the ignore index is 255, as in
                masks of 0 and 255; and, of training data, if all have one class. Names the ``class_map`` to write.
        """
        self.refuse_none()
        found = self.pixels.nonzero().flatten().tolist()
        self.refuse_ignored_foreground()
        if len(found) == 1 and of_training:
            ignored = self.ignored / (self.ignored + int(self.pixels.sum()))
            hint = (
                f"; {ignored:.1%} of the pixels are ignored: a class_map that lacks a value ignores it, as in "
                f"class_map={{255: 1}} in place of class_map={{0: 0, 255: 1}}"
                if self.ignored
                else "; is it a class_map that is missing, or the wrong folder?"
            )
            raise DataError(
                f"all labeled pixels of the {self.name} data set have the class {found[0]}; "
                f"expected two of the {self.num_classes} classes or more{hint}"
            )
        self.warn_of_mixed_values()
        missing = [index for index in range(self.num_classes) if index not in found]
        if missing and rank() == 0:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            warn(
                f"no mask of the {self.name} data set holds the class{'es' if len(missing) > 1 else ''} {shown} "
                f"({len(missing)} of {self.num_classes}; "
                + ("the network cannot learn what no mask holds: " if of_training else "the mIoU leaves them out: ")
                + "check num_classes and class_map)"
            )

    def refuse_none(self) -> None:
        """Raise a ``DataError`` if all pixels are ignored."""
        if not self.pixels.any():
            raise DataError(
                f"the masks of the {self.name} data set hold nothing but the ignore index {self.ignore_index}; "
                "expected classes (class_map= gives values their classes)"
            )

    def refuse_ignored_foreground(self) -> None:
        """Raise a ``DataError`` for masks of 0 and 255 where 255 is the ignore index."""
        if self.ignored and self.ignore_index == 255 and self.pixels.nonzero().flatten().tolist() == [0]:
            raise DataError(
                f"the masks of the {self.name} data set hold the values 0 and 255 alone, and 255 is the ignore index, "
                "so that class 0 is all there is; where 255 is the foreground, expected class_map={0: 0, 255: 1} "
                "(of SegmentationFolder and ListedFiles; stseg.data.ClassMap in other data sets), or, where there is a "
                "class_map, the values that the masks hold as its keys"
            )

    def warn_of_mixed_values(self) -> None:
        """Warn if ignored pixels occur only in masks of class 0, as if some masks were stored otherwise."""
        if self.only_ignored and not self.with_ignored and len(self.pixels.nonzero()) > 1 and rank() == 0:
            warn(
                f"{self.only_ignored} of the {self.total} masks of the {self.name} data set hold nothing but class 0 "
                "and ignored pixels, and the other masks no ignored pixel: as if some were stored as 0 and 1, others "
                "as 0 and 255; where both mean the foreground: class_map={0: 0, 1: 1, 255: 1}"
            )

    def show(self) -> None:
        """Print the table of classes, in the first process."""
        if rank() == 0:
            show_message(self.table())

    def table(self) -> str:
        """Format classes, their share of pixels and the number of masks that hold them.

        Example:
            >>> counts = ClassCounts(2)
            >>> counts.add(torch.tensor([[0, 1, 1, 255]]))
            >>> print(counts.table())
            labeled: 1 mask
              class   pixels  masks
                  0  25.00 %      1
                  1  50.00 %      1
            ignored  25.00 %
        """
        title = f"{self.name}: {self.total} mask{'s' if self.total != 1 else ''}"
        lines = [title, f"{'class':>7}  {'pixels':>7}  masks"]
        everything = max(1, int(self.pixels.sum()) + self.ignored)
        for index, (pixels, masks) in enumerate(zip(self.pixels.tolist(), self.masks.tolist(), strict=True)):
            if index < _SHOWN:
                lines.append(f"{index:>7}  {pixels / everything:>7.2%}  {masks:>5}".replace("%", " %"))
        if self.num_classes > _SHOWN:
            lines.append(f"    ...  ({self.num_classes - _SHOWN} more classes)")
        lines.append(f"ignored  {self.ignored / everything:>7.2%}".replace("%", " %"))
        return "\n".join(lines)

    def provenance(self) -> dict[str, Any]:
        """Return the counts, JSON-serializable."""
        return {"pixels": self.pixels.tolist(), "masks": self.masks.tolist(), "ignored": self.ignored}


def count_classes(store: MaskStore, ids: Sequence[str], like: ClassCounts) -> ClassCounts:
    """Count the pixels of stored masks, of evenly spaced 1,000 if there are more; broken ones are left out.

    Args:
        store: the masks.
        ids: their names.
        like: counts with the same classes and ignore index.
    """
    counts = ClassCounts(like.num_classes, like.ignore_index, "pseudo-labeled")
    for id in ids[:: max(1, -(-len(ids) // _MOST_COUNTED))]:
        with suppress(KeyError, OSError, StsegError):  # what trains on it reports that
            counts.add(store.get(id))
    return counts
