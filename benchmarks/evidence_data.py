"""The data of ``evidence.py``: a set with all its masks, and the draws of those that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as vision

from stseg.data import SegmentationFolder, read_ids, split_ids
from stseg.samples import ids_of

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


@dataclass(frozen=True)
class Source:
    """A data set to gather evidence on.

    Args:
        train: all training images with their masks, ``(image, mask)``, with ``ids``.
        val: what every network is evaluated on.
        classes: the name of each class.
        split: ``(fraction, seed) -> (labelled, unlabelled)`` ids of ``train``.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    classes: tuple[str, ...]
    split: Callable[[str, int], tuple[list[str], list[str]]]


class Resized(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks at one size, held in memory once they have been read."""

    def __init__(self, dataset: SegmentationFolder, size: tuple[int, int]) -> None:
        self.dataset, self.size, self.ids = dataset, list(size), dataset.ids
        self._read: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._read:
            image, mask = self.dataset[index]
            nearest = vision.InterpolationMode.NEAREST
            self._read[index] = (
                vision.resize(image, self.size, antialias=True),
                vision.resize(mask[None], self.size, interpolation=nearest)[0],
            )
        return self._read[index]


class Images(Dataset[Tensor]):
    """The images of a labelled data set without their masks."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset, self.ids = dataset, ids_of(dataset)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.dataset[index][0]
        return image


class AlsoStrong(Dataset[tuple[Tensor, Tensor]]):
    """The labelled images under other names, so that they may stand where the pseudo-labelled ones do."""

    def __init__(self, dataset: Dataset[Any], ids: Sequence[str]) -> None:
        self.dataset, self.ids = dataset, [f"{id} again" for id in ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.dataset[index]
        return image, mask


def folder_source(root: Path, *, size: tuple[int, int] | None, classes: Sequence[str]) -> Source:
    """A folder laid out as this file's first lines say."""
    train, val = (SegmentationFolder(root / part / "images", root / part / "masks") for part in ("train", "val"))

    def split(fraction: str, seed: int) -> tuple[list[str], list[str]]:
        lists = root / "splits" / fraction.replace("/", "_") / f"seed_{seed}"
        if lists.is_dir():
            return read_ids(lists / "labeled.txt"), read_ids(lists / "unlabeled.txt")
        return split_ids(train.ids, labelled=share_of(fraction), seed=seed)

    if size is None:
        return Source(train, val, tuple(classes), split)
    return Source(Resized(train, size), Resized(val, size), tuple(classes), split)


def share_of(fraction: str) -> float | int:
    """The share that a text such as "1/8" names, or the number of images that "20" does."""
    above, slash, below = fraction.partition("/")
    return int(above) / int(below) if slash else int(above)
