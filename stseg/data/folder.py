"""Images and masks in folders, paired by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from stseg.data._layout import Layout, counted
from stseg.data._reading import ItemReader, Mode
from stseg.errors import DataError, DataWarning


class SegmentationFolder(Dataset[Any]):
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
        # Only suffixes, parallel to the ids: full paths of a million files would fill the workers' memory.
        self._mask_suffixes = None
        if masked is not None:
            stems = layout.pair(chosen, found, masked, labeled_only=labeled_only)
            if ids is None:
                layout.refuse_lone_masks(found, masked)
            self._mask_suffixes = [masked.files[id] for id in masked.linked_all(stems)]
        self._image_suffixes = [found.files[stem] for stem in stems]
        self.ids = [id_prefix + stem for stem in stems] if id_prefix else stems
        self.without_mask, self.left_out = len(chosen) - len(stems), found.left_out
        if self.left_out:
            warnings.warn(_left_out(self.images, self.left_out), DataWarning, stacklevel=2)
        if text := layout.perhaps_masks(stems, found):
            warnings.warn(text, DataWarning, stacklevel=2)

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
