"""Images and masks in folders, paired by name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

from stseg.data._files import Found
from stseg.data._layout import Layout, counted
from stseg.data._reading import ItemReader, Mode
from stseg.data.named import NamedDataset
from stseg.errors import DataError, DataWarning


class SegmentationFolder(NamedDataset[Any]):
    """Data set of the images in a folder, with or without masks in another.

    Files are paired by their path in the folder without suffix, which is the id: ``images/a/0001.jpg`` with
    ``masks/a/0001.png``, id ``a/0001``. Images may be JPEG, JPEG 2000, PNG, BMP, TIFF, WebP, GIF, PPM, PGM, PNM and, if
    Pillow reads it, AVIF; masks PNG, BMP or TIFF, which are lossless. Hidden files are ignored.

    Folders are searched to any depth, also behind links, but none of them twice: a link to a folder that was searched
    already, or to one above the link, adds no ids.

    Args:
        images: folder of images: gray, RGB, palette, of 8 or 16 bits; TIFFs of any depth and number of bands with
            ``pip install "stseg[tiff]"``.
        masks: folder of masks: gray of any depth, palette (the indices are the classes), colors; or None. With
            ``mask_suffix`` it may be the folder of the images.
        ids: which of the images, in which order; by default all, sorted.
        exclude: ids of images to leave out, such as those of the labeled ones.
        labeled_only: whether to take only the images that have a mask. If False, an image without mask is an error.
            :func:`split_by_masks` returns the others as well.
        mask_suffix: what the names of masks have after those of their images: with ``"_mask"``, the mask of
            ``car_0.jpg`` is ``car_0_mask.png``. Other files in the folder of masks are ignored. In a folder of both,
            and if ``masks`` is None, files whose names end so are masks and not images.
        id_prefix: what to put before all ids, such as ``"unlabeled/"``, to tell them from the equal ones of another
            folder. ``ids`` and ``exclude`` are given with it.
        mode: ``"RGB"``, ``"RGBA"`` or ``"L"`` (gray), into which images are converted, or None for the
            channels that each file has.
        class_map: the class of each value of the masks, such as ``{0: 0, 255: 1}``, or of each color, such as
            ``{(0, 0, 0): 0, (128, 0, 0): 1}``; by default the values are the classes.
        unmapped: class of the values that ``class_map`` lacks: by default the ignore index, 255; None raises an
            error for them.
        value_range: the values of black and white in images of more than 8 bits, such as ``(0, 4095)`` for 12 bits in
            16-bit files; None where the files state them or use their highest bit.
        apply_exif: whether images are turned by their EXIF orientation; None turns them, and warns where the mask may
            lie on the pixels as stored.

    Attributes:
        ids: name of each item.
        without_mask: number of images that ``labeled_only`` left out.
        left_out: number of files in the folder of images that are none, by suffix in lower case, such as
            ``{".npy": 2}``. Hidden files, ``desktop.ini`` and ``Thumbs.db`` do not count.

    Shape:
        Items are the image, uint8 ``(C, H, W)``, or float32 in [0, 1] from files of more than 8 bits; with masks, the
        image and the mask, ``(H, W)`` uint8 or int32. Masks hold the values that TIFFs store, whatever their
        photometric interpretation; 0 and 255 for black and white PNG and BMP; the indices of palettes.

    Raises:
        DataError: if a folder is missing or has no usable file, an image has no mask or a mask no image, two
            files have the same id, or one of ``ids`` and ``exclude`` is that of no image; names the files and the
            nearest names. When an item is read, if its image or mask cannot be read without loss, its mask has colors
            or values without a class, or differs from the image in size.
        UnreadableImageError: when an item is read, if its file is broken or a broken link; names the file.
        TypeError: if ``ids`` or ``exclude`` is a string, a path or a data set.
        ValueError: if ``labeled_only`` is given without ``masks``, or ``mask_suffix`` or ``id_prefix`` cannot be part
            of a path.

    Warns:
        DataWarning: if files in the folder of images were left out, see ``left_out``, or the images that are taken
            are probably the masks of those that are not.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("images/0001", "images/0002", "masks/0001"):
        ...     (root / name).parent.mkdir(exist_ok=True)
        ...     Image.new("L", (6, 4)).save(root / f"{name}.png")
        >>> labeled = SegmentationFolder(root / "images", root / "masks", labeled_only=True)
        >>> image, mask = labeled[0]
        >>> labeled.ids, image.shape, mask.shape
        (['0001'], torch.Size([3, 4, 6]), torch.Size([4, 6]))
        >>> SegmentationFolder(root / "images", exclude=labeled.ids).ids
        ['0002']
    """

    concurrent = True

    def __init__(
        self,
        images: str | Path,
        masks: str | Path | None = None,
        *,
        ids: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        labeled_only: bool = False,
        mask_suffix: str = "",
        id_prefix: str = "",
        mode: Mode | None = "RGB",
        class_map: Mapping[Any, int] | None = None,
        unmapped: int | None = 255,
        value_range: tuple[float, float] | None = None,
        apply_exif: bool | None = None,
    ) -> None:
        self._read = ItemReader(mode, class_map, unmapped, value_range, apply_exif)
        self.images = Path(images)
        self.masks = None if masks is None else Path(masks)
        self.mask_suffix, self.id_prefix = mask_suffix, id_prefix
        if labeled_only and masks is None:
            raise ValueError("labeled_only is True without masks; expected SegmentationFolder(images, masks, ...)")
        layout = Layout(self.images, self.masks, mask_suffix, id_prefix)
        layout.check()
        found, masked = layout.find()
        stems = chosen = layout.choose(ids, exclude, found)
        if masked is not None:
            stems = layout.pair(chosen, found, masked, labeled_only=labeled_only)
            if ids is None:
                layout.refuse_lone_masks(found, masked)
        self._take(stems, found, masked)
        self.without_mask, self.left_out = len(chosen) - len(stems), found.left_out
        if self.left_out:
            _warn(_left_out(self.images, self.left_out))
        if text := layout.perhaps_masks(stems, found):
            _warn(text)

    def _take(self, stems: list[str], images: Found, masks: Found | None) -> None:
        # Only suffixes, parallel to the ids: full paths of a million files would fill the workers' memory.
        self._image_suffixes = [images.files[stem] for stem in stems]
        self._mask_suffixes = None if masks is None else [masks.files[stem] for stem in masks.linked_all(stems)]
        self.ids = [self.id_prefix + stem for stem in stems] if self.id_prefix else stems

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        mask = None if self._mask_suffixes is None else self.mask_path(index)
        return self._read(self.image_path(index), mask, name=self.ids[index])

    def __repr__(self) -> str:
        masks = "" if self.masks is None else f", {str(self.masks)!r}"
        without = [f"{self.without_mask} without a mask"] if self.without_mask else []
        left_out = ", ".join(without + counted(self.left_out))
        more = f"; left out: {left_out}" if left_out else ""
        return f"SegmentationFolder({str(self.images)!r}{masks}: {len(self)} items{more})"

    def image_path(self, index: int) -> Path:
        """Return the file of an image."""
        return self.images / (self._stem(index) + self._image_suffixes[index])

    def mask_path(self, index: int) -> Path:
        """Return the file of an image's mask."""
        if self.masks is None or self._mask_suffixes is None:
            raise DataError(f"the images in {self.images} were taken without masks; expected masks=")
        return self.masks / (self._stem(index) + self.mask_suffix + self._mask_suffixes[index])

    def _stem(self, index: int) -> str:
        return self.ids[index][len(self.id_prefix) :]


def split_by_masks(
    images: str | Path,
    masks: str | Path,
    *,
    ids: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    mask_suffix: str = "",
    id_prefix: str = "",
    mode: Mode | None = "RGB",
    class_map: Mapping[Any, int] | None = None,
    unmapped: int | None = 255,
    value_range: tuple[float, float] | None = None,
    apply_exif: bool | None = None,
) -> tuple[SegmentationFolder, SegmentationFolder]:
    """Split a folder of images, some of which have a mask, into labeled and unlabeled ones.

    Args:
        images: folder of images.
        masks: folder of the masks of some of them. With ``mask_suffix`` it may be the folder of the images.
        ids: which of the images, in which order; by default all, sorted.
        exclude: ids of images to leave out of both, such as those of the validation images.
        mask_suffix: as of :class:`SegmentationFolder`, as are those that follow.
        id_prefix: what to put before all ids.
        mode: channels into which images are converted.
        class_map: the class of each value, or of each color, of the masks.
        unmapped: class of the values that ``class_map`` lacks.
        value_range: the values of black and white in images of more than 8 bits.
        apply_exif: whether images are turned by their EXIF orientation.

    Returns:
        The images that have a mask, with it, and the images that have none.

    Raises:
        DataError: if no image has a mask, or every one has, or a mask has no image; names it. Also where
            :class:`SegmentationFolder` raises one.
        TypeError: if ``ids`` or ``exclude`` is a string, a path or a data set.
        ValueError: if ``mask_suffix`` or ``id_prefix`` cannot be part of a path.

    Warns:
        DataWarning: if files in the folder of images were left out.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> for name in ("images/0001", "images/0002", "masks/0001"):
        ...     (root / name).parent.mkdir(exist_ok=True)
        ...     Image.new("L", (6, 4)).save(root / f"{name}.png")
        >>> labeled, unlabeled = split_by_masks(root / "images", root / "masks")
        >>> labeled.ids, unlabeled.ids
        (['0001'], ['0002'])
    """
    labeled = SegmentationFolder(
        images,
        masks,
        ids=ids,
        exclude=exclude,
        labeled_only=True,
        mask_suffix=mask_suffix,
        id_prefix=id_prefix,
        mode=mode,
        class_map=class_map,
        unmapped=unmapped,
        value_range=value_range,
        apply_exif=apply_exif,
    )
    if not labeled.without_mask:
        raise DataError(
            f"every image of {images} that is chosen has a mask in {masks}; expected some without. "
            "SegmentationFolder(images, masks) is the data set of all, and stseg.data.split_ids draws some of its ids"
        )
    layout = Layout(labeled.images, labeled.masks, mask_suffix, id_prefix)
    found, _ = layout.find()
    unlabeled = copy(labeled)
    unlabeled.masks, unlabeled.without_mask = None, 0
    unlabeled._take(layout.choose(ids, [*exclude, *labeled.ids], found), found, None)
    return labeled, unlabeled


def _warn(text: str) -> None:
    """Warn on behalf of the code that called this module."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"] == __name__:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, DataWarning, stacklevel=level)


def _left_out(root: Path, left_out: dict[str, int]) -> str:
    count = sum(left_out.values())
    were, they = (
        ("file", "was left out, as it is not an image")
        if count == 1
        else ("files", "were left out, as they are not images")
    )
    return (
        f"{count} {were} in {root} {they} that SegmentationFolder reads: {', '.join(counted(left_out))}. "
        "Convert images among them, to PNG for example, or read them in a data set of your own, a class with "
        "__len__ and __getitem__; move other files elsewhere"
    )
