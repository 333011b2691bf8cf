"""Images and masks in folders, paired by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from stseg.data._reading import MASK_SUFFIXES, ItemReader, Mode, check_folder, listed_suffixes
from stseg.data.items import duplicate
from stseg.errors import DataError

_IMAGES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"))
_UNFIT_MASKS = (".jpg", ".jpeg", ".webp", ".gif")  # lossy, or with a palette that image editors may reorder


class SegmentationFolder(Dataset[Any]):
    """Data set of the images in a folder, with or without masks in another.

    Files are paired by their path in the folder without suffix, which is the id: ``images/a/0001.jpg`` with
    ``masks/a/0001.png``, id ``a/0001``. Folders are searched to any depth; hidden files and files of other
    types are ignored. Images may be JPEG, PNG, BMP, TIFF or WebP; masks PNG, BMP or TIFF, which are lossless.

    Args:
        images: folder of images: RGB, gray, RGBA, palette, 16-bit gray (scaled to 8 bits), rotated
            according to their EXIF data.
        masks: folder of masks: 8-bit gray, palette (the indices are the classes) or 16-bit gray; or None.
        ids: which of the images, in which order; by default all, sorted.
        mode: ``"RGB"``, ``"RGBA"`` or ``"L"`` (gray), into which images are converted, or None for the
            channels that each file has.
        class_map: the class of each value of the masks, such as ``{0: 0, 255: 1}``; by default the values are
            the classes.
        unmapped: class of the values that ``class_map`` lacks: by default the ignore index, 255; None raises an
            error for them.

    Attributes:
        ids: name of each item.

    Shape:
        Items are the image, uint8 ``(C, H, W)``; with masks, the image and the mask, ``(H, W)`` uint8 or
        int32.

    Raises:
        DataError: if a folder is missing or has no usable file, an image has no mask or a mask no image, or
            two files have the same id; names the files. When an item is read, if its mask is a color image, has
            an unmapped value, or differs from the image in size.
        UnreadableImageError: when an item is read, if its file is broken; names the file.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for folder in ("images", "masks"):
        ...     (root / folder).mkdir()
        ...     Image.new("L", (6, 4)).save(root / folder / "0001.png")
        >>> dataset = SegmentationFolder(root / "images", root / "masks")
        >>> image, mask = dataset[0]
        >>> dataset.ids, image.shape, mask.shape
        (['0001'], torch.Size([3, 4, 6]), torch.Size([4, 6]))
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path | None = None,
        *,
        ids: Sequence[str] | None = None,
        mode: Mode | None = "RGB",
        class_map: Mapping[Any, int] | None = None,
        unmapped: int | None = 255,
        value_range: tuple[float, float] | None = None,
        apply_exif: bool | None = None,
    ) -> None:
        self._read = ItemReader(mode, class_map, unmapped, value_range, apply_exif)
        self.images = Path(images)
        self.masks = None if masks is None else Path(masks)
        found = _files(self.images, _IMAGES)
        if not found:
            raise DataError(f"{self.images} holds no images; expected files in {listed_suffixes(_IMAGES)}")
        self.ids = sorted(found) if ids is None else _chosen(ids, found, self.images)
        # Only suffixes, parallel to the ids: full paths of a million files would fill the workers' memory.
        self._image_suffixes = [found[id] for id in self.ids]
        self._mask_suffixes = None
        if self.masks is not None:
            self._mask_suffixes = self._pair(self.masks, found, everything=ids is None)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        mask = None if self._mask_suffixes is None else self._mask(index)
        return self._read(self._image(index), mask, name=self.ids[index])

    def __repr__(self) -> str:
        masks = "" if self.masks is None else f", {str(self.masks)!r}"
        return f"SegmentationFolder({str(self.images)!r}{masks}: {len(self)} items)"

    def _image(self, index: int) -> Path:
        return self.images / (self.ids[index] + self._image_suffixes[index])

    def _mask(self, index: int) -> Path:
        assert self.masks is not None
        assert self._mask_suffixes is not None
        return self.masks / (self.ids[index] + self._mask_suffixes[index])

    def _pair(self, masks: Path, images: dict[str, str], *, everything: bool) -> list[str]:
        one, other = self.images.resolve(), masks.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise DataError(
                f"images and masks must be in folders of their own, neither inside the other: {one}, {other}"
            )
        found = _files(masks, MASK_SUFFIXES)
        without = [id for id in self.ids if id not in found]
        if without:
            raise DataError(
                f"the image {without[0]!r} has no mask: {_why_no_mask(masks, without[0])} "
                f"({len(without)} of {len(self)} images have none)"
            )
        if everything and len(found) > len(images):
            extra = min(found.keys() - images.keys())
            raise DataError(
                f"the mask {masks / (extra + found[extra])} has no image {extra!r} in {self.images}; "
                "choose the images with ids=..., or remove it"
            )
        return [found[id] for id in self.ids]


def _files(root: Path, kinds: frozenset[str]) -> dict[str, str]:
    """Map the ids of the files in a folder to their suffixes."""
    check_folder(root)
    found: dict[str, str] = {}
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_reraise):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else f"{inside}/"
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in kinds or name.startswith("."):
                continue
            id = prefix + stem
            if id in found:
                raise DataError(
                    f"{root / (id + found[id])} and {root / (id + suffix)} have the same id {id!r}; "
                    "expected one file for each"
                )
            found[id] = sys.intern(suffix)
    return found


def _reraise(error: OSError) -> None:
    raise error


def _chosen(ids: Sequence[str], found: dict[str, str], root: Path) -> list[str]:
    if isinstance(ids, (str, os.PathLike)):
        raise TypeError(f"ids is {ids!r}; expected a sequence of ids (stseg.data.read_ids reads a file of them)")
    ids = list(ids)
    if not ids:
        raise DataError("ids is empty; expected one or more")
    for id in ids:
        if id not in found:
            stem = os.path.splitext(id)[0] if isinstance(id, str) else str(id)
            hint = f"; did you mean {stem!r}? Ids are without suffix" if stem in found else ""
            raise DataError(f"there is no image with the id {id!r} in {root}{hint}")
    twice = duplicate(ids)
    if twice is not None:
        raise DataError(f"the id {twice!r} occurs more than once in ids; ids must be unique")
    return ids


def _why_no_mask(masks: Path, id: str) -> str:
    for suffix in _UNFIT_MASKS:
        for path in (masks / (id + suffix), masks / (id + suffix.upper())):
            if path.exists():
                return f"{path} has a format that may not preserve class indices; expected PNG, BMP or TIFF"
    return f"expected {masks / id} with one of the suffixes {listed_suffixes(MASK_SUFFIXES)}"
