"""Image and mask files as the items of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from stseg.data._class_map import ClassMap
from stseg.data.convert import as_image, eight_bits, pair_of
from stseg.errors import DataError, UnreadableImageError

Mode = Literal["RGB", "RGBA", "L"]
MASK_SUFFIXES = frozenset((".png", ".bmp", ".tif", ".tiff"))  # lossless formats


class ItemReader:
    """Reader of the items of file data sets: an image, or an image and its mask.

    Args:
        mode: ``"RGB"``, ``"RGBA"`` or ``"L"`` (gray), into which images are converted, or None for the
            channels that each file has.
        class_map: the class of each value of the masks, or None where the values are the classes.
        unmapped: class of the values that ``class_map`` lacks; None raises an error for them.

    Raises:
        ValueError: if ``mode`` is not one of these, or ``class_map`` is invalid.
    """

    def __init__(
        self, mode: Mode | None = "RGB", class_map: Mapping[int, int] | None = None, unmapped: int | None = 255
    ) -> None:
        if mode not in ("RGB", "RGBA", "L", None):
            raise ValueError(f"mode is {mode!r}; expected 'RGB', 'RGBA', 'L' or None")
        if class_map is None and unmapped != 255:
            raise ValueError(f"unmapped is {unmapped!r} without a class_map; expected both")
        self.mode = mode
        self.class_map = None if class_map is None else ClassMap(class_map, unmapped)

    def __call__(self, image: Path, mask: Path | None, *, name: str) -> Any:
        """Return the image, uint8 ``(C, H, W)``; with a mask, the image and the mask, ``(H, W)`` uint8 or int32.

        Raises:
            DataError: if the mask is a color image, has an unmapped value, or differs from the image in size.
            UnreadableImageError: if a file is broken; names the file.
        """
        pixels = read_file(image)
        if self.mode is not None:
            pixels = eight_bits(pixels, name=name)
            pixels = pixels if pixels.mode == self.mode else pixels.convert(self.mode)
        if mask is None:
            return as_image(pixels, name=name)
        pair = pair_of((pixels, read_file(mask, indices=True)), name=name)
        return pair if self.class_map is None else (pair[0], self.class_map(pair[1], name=name))


def read_file(path: Path, *, indices: bool = False) -> Image.Image:
    """Read a file as an upright image; with ``indices``, keep the values that the file stores.

    Raises:
        UnreadableImageError: if the file is missing or broken; names it.
    """
    try:
        with Image.open(path) as image:
            raw = image.tile[0][3] if image.tile else None
            raw = raw[0] if isinstance(raw, tuple) else raw  # TIFF
            if indices and image.format == "BMP" and image.mode == "1" and path.read_bytes()[28:30] != b"\x01\x00":
                raise ValueError("Pillow misreads a BMP of more than 1 bit whose palette is black and white; use PNG")
            image.load()
            upright = ImageOps.exif_transpose(image)
            # PIL scales gray of 2 or 4 bits to 0..255.
            spread = {"L;2": 85, "L;4": 17}.get(raw if isinstance(raw, str) else "", 1)
            return upright.point(lambda value: value // spread) if indices and spread > 1 else upright
    except Exception as error:  # PIL raises many types for a broken file
        raise UnreadableImageError(f"{path} cannot be read as an image: {error}") from error


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
