"""Images and masks in folders, paired by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps
from torch.utils.data import Dataset

from stseg.errors import DataError, UnreadableImageError
from stseg.samples import as_image, duplicate, eight_bits, pair_of

_IMAGES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"))
_MASKS = frozenset((".png", ".bmp", ".tif", ".tiff"))
_UNFIT_MASKS = (".jpg", ".jpeg", ".webp", ".gif")  # lossy, or with a palette that programs sort anew


class SegmentationFolder(Dataset[Any]):
    """Images in a folder, with or without masks in another.

    Files are paired by their path in the folder without suffix, which is the id: ``images/a/0001.jpg`` with
    ``masks/a/0001.png``, id ``a/0001``. Folders are searched to any depth; hidden files and other kinds of
    files do not count. Images may be JPEG, PNG, BMP, TIFF or WebP; masks PNG, BMP or TIFF, which keep every
    value.

    Args:
        images: folder of images: RGB, grey, RGBA, palette, 16-bit grey (scaled to 8 bits), turned upright as
            their EXIF data say.
        masks: folder of masks: 8-bit grey, palette (the indices are the classes) or 16-bit grey; or None.
        ids: which of the images, in which order; by default all, sorted.
        mode: ``"RGB"``, ``"RGBA"`` or ``"L"`` (grey), into which images are converted, or None for the
            channels that each file has.

    Attributes:
        ids: name of each item.

    Shape:
        Items are the image, uint8 ``(C, H, W)``; with masks, the image and the mask, ``(H, W)`` uint8 or
        int32.

    Raises:
        DataError: if a folder is missing or holds nothing of use, an image has no mask or a mask no image, or
            two files have one id; names the files. When an item is read, if its mask holds colours or is not
            of the image's size.
        UnreadableImageError: when an item is read, if its file is broken; names the file.

    Example:
        >>> import tempfile
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
        mode: Literal["RGB", "RGBA", "L"] | None = "RGB",
    ) -> None:
        if mode not in ("RGB", "RGBA", "L", None):
            raise ValueError(f"mode is {mode!r}; expected 'RGB', 'RGBA', 'L' or None")
        self.images = Path(images)
        self.masks = None if masks is None else Path(masks)
        self.mode = mode
        found = _files(self.images, _IMAGES)
        if not found:
            raise DataError(f"{self.images} holds no images; expected files in {_listed(_IMAGES)}")
        self.ids = sorted(found) if ids is None else _chosen(ids, found, self.images)
        # Only suffixes, in step with the ids: whole paths of a million files would fill the workers' memory.
        self._image_suffixes = [found[id] for id in self.ids]
        self._mask_suffixes = None
        if self.masks is not None:
            self._mask_suffixes = self._pair(self.masks, found, everything=ids is None)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        id = self.ids[index]
        image = _read(self._image(index))
        if self.mode is not None:
            image = eight_bits(image, name=id)
            image = image if image.mode == self.mode else image.convert(self.mode)
        if self._mask_suffixes is None:
            return as_image(image, name=id)
        return pair_of((image, _read(self._mask(index), indices=True)), name=id)

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
        found = _files(masks, _MASKS)
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
    """Suffix by id of the files in a folder."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder" if root.exists() else f"there is no folder {root}")
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
                return f"{path} is of a format that need not keep class indices; expected PNG, BMP or TIFF"
    return f"expected {masks / id} with one of the suffixes {_listed(_MASKS)}"


def _listed(suffixes: frozenset[str]) -> str:
    return " ".join(sorted(suffixes))


def _read(path: Path, *, indices: bool = False) -> Image.Image:
    """A file as an image, upright; of masks the values as they stand in the file."""
    try:
        with Image.open(path) as image:
            raw = image.tile[0][3] if image.tile else None
            image.load()
            upright = ImageOps.exif_transpose(image)
            # Of grey with 2 or 4 bits PIL spreads the values over 0..255.
            spread = {"L;2": 85, "L;4": 17}.get(raw if isinstance(raw, str) else "", 1)
            return upright.point(lambda value: value // spread) if indices and spread > 1 else upright
    except Exception as error:  # PIL raises many kinds for a broken file
        raise UnreadableImageError(f"{path} cannot be read as an image: {error}") from error
