"""Data of ``evidence.py``: a data set with all masks, and its splits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms.v2 import functional as vision

import stseg
from stseg.data import SegmentationFolder, read_ids, split_ids

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


@dataclass(frozen=True)
class Source:
    """Data set with all masks, and its splits.

    Args:
        train: all training images with their masks, ``(image, mask)``, with ``ids``.
        val: all validation images with their masks, likewise.
        classes: the name of each class.
        split: ``(fraction, seed) -> (labeled, unlabeled)`` ids of ``train``.
    """

    train: Any
    val: Any
    classes: tuple[str, ...]
    split: Callable[[str, int], tuple[list[str], list[str]]]


class Resized(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks at one size, or as they are, held in memory once they have been read."""

    def __init__(self, dataset: SegmentationFolder, size: tuple[int, int] | None) -> None:
        self.dataset, self.size, self.ids = dataset, None if size is None else list(size), dataset.ids
        self._read: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._read:
            image, mask = self.dataset[index]
            if self.size is not None:
                nearest = vision.InterpolationMode.NEAREST
                image = vision.resize(image, self.size, antialias=True)
                mask = vision.resize(mask[None], self.size, interpolation=nearest)[0]
            self._read[index] = image, mask
        return self._read[index]


class Selected(Subset[Any]):
    """Some items of a data set, under their ids."""

    def __init__(self, dataset: Any, ids: Sequence[str]) -> None:
        where = {id: index for index, id in enumerate(dataset.ids)}
        super().__init__(dataset, [where[id] for id in ids])
        self.ids = list(ids)


class ImagesOnly(Dataset[Tensor]):
    """The images of a labeled data set without their masks."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.ids = dataset, dataset.ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.dataset[index][0]
        return image


class Renamed(Dataset[tuple[Tensor, Tensor]]):
    """The same items under other names: ``name`` with ``{}`` replaced by the old one."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.ids = dataset, [name.format(id) for id in dataset.ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.dataset[index]
        return image, mask


def folder_source(
    root: Path, *, size: tuple[int, int] | None, classes: Sequence[str], class_map: Mapping[int, int] | None = None
) -> Source:
    """Return the source of a folder with the layout described in ``evidence.py``."""
    train, val = (
        SegmentationFolder(root / part / "images", root / part / "masks", class_map=class_map)
        for part in ("train", "val")
    )

    def listed(path: Path) -> list[str]:
        ids = read_ids(path)
        if unknown := set(ids).difference(train.ids):
            raise stseg.DataError(f"{path}: there is no image {min(unknown)!r} in {root / 'train' / 'images'}")
        return ids

    def split(fraction: str, seed: int) -> tuple[list[str], list[str]]:
        lists = root / "splits" / fraction.replace("/", "_")
        if (lists / f"seed_{seed}").is_dir():
            few, many = (listed(lists / f"seed_{seed}" / f"{name}.txt") for name in ("labeled", "unlabeled"))
            return few, many
        others = sorted(lists.glob("seed_*/labeled.txt"))
        labeled = len(read_ids(others[0])) if others else share_of(fraction)
        return split_ids(train.ids, labeled=labeled, seed=seed)

    images: Any
    held_out: Any
    images, held_out = (Resized(dataset, size) for dataset in (train, val))
    if set(train.ids) & set(val.ids):
        held_out = Renamed(held_out, "val/{}")
    return Source(images, held_out, tuple(classes), split)


def share_of(fraction: str) -> float | int:
    """Parse a share such as "1/8" or "0.1", or a number of images such as "20".

    Raises:
        ValueError: if the text is none of these.
    """
    try:
        return int(fraction) if fraction.isdecimal() else float(Fraction(fraction))
    except (ValueError, ZeroDivisionError):
        raise ValueError(
            f"the fraction is {fraction!r}; expected a share such as 1/8, 0.1 or a number of images"
        ) from None
