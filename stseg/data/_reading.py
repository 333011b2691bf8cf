"""Image and mask files as the items of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stseg.data.class_map import ClassMap
from stseg.data.convert import as_image, as_mask, eight_bits, gray_of, pair_of
from stseg.data.decoding import Samples, decode_image, decode_mask, orientation_of
from stseg.data.observations import observe_turned
from stseg.data.samples import check_value_range, convert_channels, scale_samples
from stseg.errors import DataError

Mode = Literal["RGB", "RGBA", "L"]
MASK_SUFFIXES = frozenset((".png", ".bmp", ".tif", ".tiff"))  # lossless formats


class ItemReader:
    """Reader of the items of file data sets: an image, or an image and its mask.

    Args:
        mode: ``"RGB"``, ``"RGBA"`` or ``"L"`` (gray), into which images are converted, or None for the
            channels that each file has.
        class_map: the class of each value, or of each color, of the masks; None where the values are the classes.
        unmapped: class of the values that ``class_map`` lacks; None raises an error for them.
        value_range: the values of black and white in images of more than 8 bits; None where the files state them or
            use all bits.
        apply_exif: whether images are turned by their EXIF orientation; None turns them, and warns where the mask may
            lie on the pixels as stored.

    Raises:
        ValueError: if ``mode`` is not one of these, or ``class_map`` or ``value_range`` is invalid.
    """

    def __init__(
        self,
        mode: Mode | None = "RGB",
        class_map: Mapping[Any, int] | None = None,
        unmapped: int | None = 255,
        value_range: tuple[float, float] | None = None,
        apply_exif: bool | None = None,
    ) -> None:
        if mode not in ("RGB", "RGBA", "L", None):
            raise ValueError(f"mode is {mode!r}; expected 'RGB', 'RGBA', 'L' or None")
        if class_map is None and unmapped != 255:
            raise ValueError(f"unmapped is {unmapped!r} without a class_map; expected both")
        self.mode, self.apply_exif = mode, apply_exif
        self.class_map = None if class_map is None else ClassMap(class_map, unmapped)
        self.value_range = check_value_range(value_range)

    def __call__(self, image: Path, mask: Path | None, *, name: str) -> Any:
        """Return the image, uint8 or float32 ``(C, H, W)``; with a mask, image and mask, ``(H, W)`` uint8 or int32.

        Raises:
            DataError: if image or mask cannot be read without loss, the mask is in colors that ``class_map`` does not
                have or has an unmapped value, or the two differ in size.
            UnreadableImageError: if a file is broken; names the file.
        """
        decoded = decode_image(image, apply_exif=self.apply_exif is not False)
        pixels = self._pixels(decoded.image, name)
        if mask is None:
            return pixels
        classes = self._classes(mask, name)
        self._check_orientation(pixels, classes, decoded.orientation, mask, name)
        return pair_of((pixels, classes), name=name)

    def _pixels(self, image: Image.Image | Samples, name: str) -> Tensor:
        if isinstance(image, Samples):
            scaled = scale_samples(image.values, name=name, value_range=self.value_range, stated=image.stated)
            values = torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))
            values = 1 - values if image.inverted else values
            return convert_channels(values, self.mode, has_alpha=image.has_alpha, extra=image.extra, name=name)
        image = eight_bits(image, name=name)
        image = image if self.mode in (None, image.mode) else image.convert(self.mode)
        return as_image(image, name=name)

    def _classes(self, mask: Path, name: str) -> Tensor:
        colors = self.class_map is not None and self.class_map.colors
        values = decode_mask(mask, colors=colors, apply_exif=self.apply_exif is not False)
        if self.class_map is not None and self.class_map.colors:
            return self.class_map(values, name=name)
        values = gray_of(values, name=name) if values.ndim == 3 else values
        return as_mask(values, name=name) if self.class_map is None else self.class_map(values, name=name)

    def _check_orientation(self, image: Tensor, mask: Tensor, orientation: int, path: Path, name: str) -> None:
        """Refuse, or warn of, a mask that may have been drawn on the pixels as stored."""
        if self.apply_exif is False or orientation == (of_mask := orientation_of(path)):
            return
        (height, width), (mask_height, mask_width) = image.shape[-2:], mask.shape
        if (height, width) != (mask_height, mask_width) == (width, height):
            raise DataError(
                f"image and mask of {name!r} differ in size: image {height} x {width}, mask "
                f"{mask_height} x {mask_width} (height x width), as the EXIF orientation of the image ({orientation}) "
                f"is not that of the mask ({of_mask}), which was drawn on the pixels as stored; expected "
                "apply_exif=False, which reads files as they are stored, or masks of the turned images"
            )
        # The size tells that the mask was drawn on the turned image.
        sure = max(orientation, of_mask) >= 5 and height != width
        if (height, width) == (mask_height, mask_width) and not sure and self.apply_exif is None:
            observe_turned(name)


def check_folder(root: Path) -> None:
    """Raise a ``DataError`` unless ``root`` is a folder."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder" if root.exists() else f"there is no folder {root}")


def listed_suffixes(suffixes: frozenset[str]) -> str:
    """Format suffixes for messages."""
    return " ".join(sorted(suffixes))


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of each line of a UTF-8 file that is not blank.

    Raises:
        DataError: if the file is not UTF-8.
        OSError: if there is no such file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line
