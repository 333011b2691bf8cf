"""Images and masks in one folder or two, by the rules of :class:`stseg.data.SegmentationFolder`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stseg.data._files import Found, image_suffixes, names_of_images, pairs_line, scan
from stseg.data._names import ending_of, nearest, quoted
from stseg.data._reading import MASK_SUFFIXES, check_folder, listed_suffixes
from stseg.data.items import duplicate
from stseg.data.named import check_ids
from stseg.errors import DataError

_LOSSY = (".jpg", ".jpeg", ".webp", ".gif")  # lossy, or with a palette that image editors may reorder
_ARRAYS = frozenset((".npy", ".npz", ".mat"))


class Layout(NamedTuple):
    """Where images and masks are. Its methods take and return stems: ids without ``id_prefix``."""

    images: Path
    masks: Path | None
    mask_suffix: str
    id_prefix: str

    def check(self) -> None:
        """Raise an error unless suffix and prefix are parts of a path and the folders do not overlap."""
        _check_mask_suffix(self.mask_suffix)
        _check_id_prefix(self.id_prefix)
        if self.masks is None:
            return
        one, other = self.images.resolve(), self.masks.resolve()
        if one == other and not self.mask_suffix:
            check_folder(self.images)
            raise DataError(
                "images and masks must be in folders of their own, or differ in their names; "
                f"both are in {one}: {_beside_line(one)}"
            )
        if one in other.parents or other in one.parents:
            raise DataError(
                f"images and masks must be in folders of their own, neither inside the other: {one}, {other}; "
                "stseg.data.ListedFiles takes files wherever they are"
            )

    @property
    def in_one_folder(self) -> bool:
        """Whether the masks are in the folder of the images."""
        return self.masks is None or self.images.resolve() == self.masks.resolve()

    def find(self) -> tuple[Found, Found | None]:
        """Find the images and, if there is a folder of them, the masks."""
        images = scan(self.images, image_suffixes())
        if self.mask_suffix and self.in_one_folder:
            beside = self._taken_out(images)
            masks = None if self.masks is None else beside
        elif self.masks is not None:
            unfit = (image_suffixes() | _ARRAYS) - MASK_SUFFIXES
            masks = scan(self.masks, MASK_SUFFIXES, unfit=unfit, end=self.mask_suffix).without_end(self.mask_suffix)
        else:
            masks = None
        if not images.files:
            others = f"; it holds {', '.join(counted(images.left_out))}" if images.left_out else ""
            raise DataError(
                f"{self.images} holds no images; expected files in {listed_suffixes(image_suffixes())}{others}"
            )
        return images, masks

    def choose(self, ids: Sequence[str] | None, exclude: Sequence[str], images: Found) -> list[str]:
        """Return the images that ``ids`` and ``exclude`` leave."""
        stems = sorted(images.files) if ids is None else self._known(ids, "ids", images)
        if not stems:
            raise DataError("ids is empty; expected one or more")
        if ids is not None and (twice := duplicate(stems)) is not None:
            raise DataError(f"the id {self.id_prefix + twice!r} occurs more than once in ids; ids must be unique")
        if excluded := set(self._known(exclude, "exclude", images)):
            stems = [stem for stem in stems if stem not in excluded]
        if not stems:
            raise DataError(f"exclude names every image of {self.images} that is chosen; expected one or more others")
        return stems

    def perhaps_masks(self, stems: list[str], images: Found) -> str:
        """Return a warning, or ``""``: if the masks of all images that were left out are probably among the others."""
        if self.masks is not None or self.mask_suffix or not len(stems) < len(images.files) <= 2 * len(stems):
            return ""
        there = set(stems)
        others = [stem for stem in images.files if stem not in there]
        end = ending_of(others, there) if len(others) > 1 else None
        if end is None or not all(stem + end in there for stem in others):
            return ""
        return (
            f"the images {self.id_prefix + min(others) + end!r} and {len(others) - 1} more in {self.images} have "
            f"the names of those left out with {end!r} after them: if they are masks, write mask_suffix={quoted(end)}"
        )

    def pair(self, stems: list[str], images: Found, masks: Found, *, labeled_only: bool) -> list[str]:
        """Return the images that have a mask; those without are an error unless ``labeled_only`` is true."""
        linked = masks.linked_all(stems)
        if all(map(masks.files.__contains__, linked)):
            return stems
        without = [stem for stem, found in zip(stems, linked, strict=True) if found not in masks.files]
        unfit = next((stem for stem in without if stem in masks.unfit), None)
        if unfit is None and labeled_only and len(without) < len(stems):
            lacking = set(without)
            return [stem for stem in stems if stem not in lacking]
        count = f"({len(without)} of {len(stems)} images have none)"
        if unfit is not None:
            raise DataError(self._unfit_mask(unfit, masks, count))
        others = "; labeled_only=True takes the images that have a mask, ids=... those that it names"
        raise DataError(self._no_mask(without, count, images) + ("" if labeled_only else others))

    def refuse_lone_masks(self, images: Found, masks: Found) -> None:
        """Raise a ``DataError`` if a mask has no image."""
        used = set(masks.linked_all(list(images.files))) if masks.links else images.files.keys()
        found = {**masks.unfit, **masks.files} if self.in_one_folder else masks.files
        lone = sorted(stem for stem in found if stem not in used and images.linked(stem) not in images.files)
        if lone:
            beside = f"; files whose names end with mask_suffix, {self.mask_suffix!r}, are masks"
            raise DataError(
                f"the mask {self._mask(lone[0])}{found[lone[0]]} has no image {lone[0]!r} in {self.images}"
                f"{beside if self.in_one_folder else ''}{self._like_lone(lone, images, masks)}; "
                "choose the images with ids=..., or remove it"
            )

    def _mask(self, stem: str) -> str:
        return str(self.masks and self.masks / (stem + self.mask_suffix))

    def _taken_out(self, images: Found) -> Found:
        """Take the files whose names end with ``mask_suffix`` out of the images and return them."""
        ended = [stem for stem in images.files if stem.endswith(self.mask_suffix)]
        if self.masks is None and not ended:
            raise DataError(
                f"mask_suffix is {self.mask_suffix!r}, but no file in {self.images} has a name that ends so; "
                "leave mask_suffix out if there are only images in the folder"
            )
        beside = Found({}, {}, {}, images.links)
        for stem in ended:
            suffix = images.files.pop(stem)
            fit = suffix.lower() in MASK_SUFFIXES
            (beside.files if fit else beside.unfit)[stem.removesuffix(self.mask_suffix)] = suffix
        return beside

    def _known(self, ids: Sequence[str], argument: str, images: Found) -> list[str]:
        check_ids(argument, ids)
        ids, prefix = list(ids), self.id_prefix
        for id in ids:
            if not isinstance(id, str) or not id.startswith(prefix) or id[len(prefix) :] not in images.files:
                raise DataError(
                    f"there is no image with the id {id!r} in {self.images}{self._like_id(id, ids, images)}"
                )
        return [id[len(prefix) :] for id in ids] if prefix else ids

    def _like_id(self, id: Any, ids: Sequence[Any], images: Found) -> str:
        """Say which image an id may mean that is not there."""
        if not isinstance(id, str) or not id:
            return ""
        stem, prefix = id.removeprefix(self.id_prefix), self.id_prefix
        if stem in images.files:
            return f"; did you mean {prefix + stem!r}? Ids are with id_prefix, {prefix!r}"
        if (bare := os.path.splitext(stem)[0]) in images.files:
            return f"; did you mean {prefix + bare!r}? Ids are without suffix"
        if (linked := images.linked(stem)) in images.files:
            return f"; did you mean {prefix + linked!r}? A link leads there, and no file has two ids"
        return nearest(id, {prefix + other for other in images.files} - {*map(str, ids)})

    def _no_mask(self, without: list[str], count: str, images: Found) -> str:
        assert self.masks is not None
        there = {name for name, _ in names_of_images(self.masks)} - {stem + self.mask_suffix for stem in images.files}
        there -= images.files.keys() if self.in_one_folder else set()
        end = ending_of(without, there)
        if end is not None and end != self.mask_suffix:
            near = f"; {without[0] + end!r} is there: write mask_suffix={quoted(end)}"
        else:
            near = nearest(without[0] + self.mask_suffix, there)
        return (
            f"the image {self.id_prefix + without[0]!r} has no mask: expected {self._mask(without[0])} with one of the "
            f"suffixes {listed_suffixes(MASK_SUFFIXES)} {count}{near}"
        )

    def _unfit_mask(self, stem: str, masks: Found, count: str) -> str:
        suffix = masks.unfit[stem]
        lossy = "has a format that may not preserve class indices"
        fault = lossy if suffix.lower() in _LOSSY else "is of a format that masks are not read from"
        path = self._mask(stem) + suffix
        return f"the image {self.id_prefix + stem!r} has no mask: {path} {fault}; expected PNG, BMP or TIFF {count}"

    def _like_lone(self, lone: list[str], images: Found, masks: Found) -> str:
        """Say which image a mask without one may belong to."""
        if not self.mask_suffix:
            starts = [lone[0][:length] for length in range(1, len(lone[0])) if lone[0][:length] in images.files]
            end = ending_of(starts[-1:], set(lone)) if starts else None
            if end is not None and all(stem.removesuffix(end) in images.files for stem in lone):
                return f"; {starts[-1]!r} is there: write mask_suffix={quoted(end)}"
        return nearest(lone[0], images.files.keys() - masks.files.keys())


def counted(left_out: dict[str, int]) -> list[str]:
    """Format numbers of files by suffix for messages, the largest first."""
    ordered = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return [f"{count} {suffix or 'without suffix'}" for suffix, count in ordered]


def _check_mask_suffix(suffix: str) -> None:
    if not isinstance(suffix, str):
        raise TypeError(f"mask_suffix is {suffix!r}; expected a string, such as '_mask'")
    if "/" in suffix or "\\" in suffix:
        raise ValueError(f"mask_suffix is {suffix!r}; expected the end of a name, without folders, such as '_mask'")


def _check_id_prefix(prefix: str) -> None:
    if not isinstance(prefix, str):
        raise TypeError(f"id_prefix is {prefix!r}; expected a string, such as 'unlabeled/'")
    folders = prefix.split("/")[:-1]
    if "\\" in prefix or any(part in ("", ".", "..") for part in folders):
        slashes = prefix.replace("\\", "/").strip("/")
        raise ValueError(
            f"id_prefix is {prefix!r}; expected a relative path with '/' after each folder and without '.' or '..'"
            + (f", such as {slashes + '/'!r}" if ".." not in slashes and slashes else "")
        )


def _beside_line(root: Path) -> str:
    """Return the code for a folder that holds images and masks."""
    suffixes: dict[str, list[str]] = {}
    for name, suffix in names_of_images(root):
        suffixes.setdefault(name, []).append(suffix)
    for both in suffixes.values():
        mask = [suffix for suffix in both if suffix.lower() in MASK_SUFFIXES]
        image = [suffix for suffix in both if suffix.lower() not in MASK_SUFFIXES]
        if mask and image:
            line = pairs_line(root, image[0], mask[0])
            return f"mask_suffix= is for other names; if {mask[0]} files are masks of {image[0]} files, write {line}"
    names = sorted(suffixes, key=len)
    end = ending_of(names[: len(names) // 2], set(names)) if names else None
    example = "'_mask'" if end is None else quoted(end)
    return (
        f"write mask_suffix={example} if the mask of 'a.jpg' is called 'a{example[1:-1]}.png'; "
        "stseg.data.ListedFiles pairs files of any names"
    )
