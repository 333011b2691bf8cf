"""PNG files of masks: written atomically and sealed, so that a file that is read is the one that was written."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from stseg.storage.files import write_atomically
from stseg.storage.seals import damaged, seal

Pixels: TypeAlias = np.ndarray[Any, np.dtype[Any]]

LABEL_AGAIN = "label its image again"
_TEXT = "stseg"  # name of the text in the file: digest of the pixels, seal, and checksum of the image
_SETTINGS = "stseg-settings"  # name of the text that describes whose file it is


class _Text(NamedTuple):
    digest: str
    seal: str
    image: str = ""


class Written(NamedTuple):
    """What a PNG file says of itself."""

    settings: dict[str, Any] | None
    """Those that it was written with; None unless :func:`write_png` wrote it with settings, under the same name."""
    image: int | None
    """Checksum of the image that it belongs to; None if it is not known."""
    pixels: Pixels | None
    """None if the file is cut off or broken."""
    changed: bool
    """Whether the pixels are not those that were written."""


def write_png(
    pixels: Pixels,
    path: Path,
    *,
    origin: str,
    name: str,
    image: int | None = None,
    gray: bool = False,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write an image of 8-bit indices, in the colors of :func:`palette`, or of gray.

    Args:
        pixels: ``(H, W)`` uint8 or uint16, which is always gray.
        path: the file.
        origin: digest of whose file it is.
        name: name of the file for its owner.
        image: checksum of the image that it belongs to.
        gray: whether 8-bit values are gray, not indices of colors.
        settings: JSON-serializable description of whose file it is, kept in the file, where :func:`read_written` finds
            it; ``origin`` is then its :func:`stseg.storage.seals.seal`.
    """
    png = Image.fromarray(pixels)
    if pixels.dtype == np.uint8 and not gray:
        png.putpalette(palette())
    digest, info, of = _digest(pixels), PngInfo(), "" if image is None else str(image)
    info.add_text(_TEXT, " ".join((digest, seal(origin, name, digest, of), of)))
    if settings is not None:
        info.add_text(_SETTINGS, json.dumps(settings, allow_nan=False))
    write_atomically(path, lambda file: png.save(file, format="PNG", compress_level=3, pnginfo=info))


def read_written(path: Path, *, name: str) -> Written:
    """Read a file, whoever wrote it.

    Raises:
        FileNotFoundError: if there is none.
    """
    try:
        with PngImageFile(path) as image:
            text, settings = _text_of(image), _settings_of(image)
            pixels = _pixels_of(image, path)
    except FileNotFoundError:
        raise
    except Exception:  # PIL raises many types for what is no PNG
        return Written(None, None, None, False)
    if text is None or settings is None or text.seal != seal(seal(settings), name, text.digest, text.image):
        return Written(None, None, pixels, False)
    number = int(text.image) if text.image.isdecimal() else None
    return Written(settings, number, pixels, pixels is not None and text.digest != _digest(pixels))


def read_png(path: Path, *, origin: str, name: str) -> tuple[Pixels, int | None]:
    """Read a file that :func:`write_png` wrote, or any other PNG if the ``origin`` is unknown (``""``).

    Returns:
        The pixels, and the checksum of the image that they belong to; None if it is not known.

    Raises:
        FileNotFoundError: if there is none.
        DamagedFileError: if it is damaged, or was written for another origin or name, or changed since.
    """
    try:
        # Not Image.open: its limit on the number of pixels is meant for untrusted files.
        with PngImageFile(path) as image:
            pixels, text = np.array(image), _text_of(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # PIL raises many types for a broken file
        raise damaged(path, f"cannot be read as a PNG ({error})", to=LABEL_AGAIN) from None
    if text is not None and text.digest != _digest(pixels):
        raise damaged(path, "was changed after it was written", to=LABEL_AGAIN)
    _refuse_other(path, text, origin, name)
    return pixels, int(text.image) if text is not None and text.image.isdecimal() else None


def holds_png(path: Path, *, origin: str, name: str) -> bool:
    """Return whether a file is there and whole, without decoding its pixels.

    Raises:
        DamagedFileError: if it is whole, but was written for another origin or name: it is not to be overwritten.
    """
    try:
        with PngImageFile(path) as image:
            text = _text_of(image)
            image.verify()  # verifies the checksums of all chunks without decoding them
        whole = _has_end(path)
    except Exception:  # PIL raises many types for a broken file
        if path.is_dir():
            raise damaged(path, "is a folder; expected a file", to=LABEL_AGAIN) from None
        return False
    if whole:
        _refuse_other(path, text, origin, name)
    return whole


@cache
def palette() -> tuple[int, ...]:
    """Return the 256 colors of Pascal VOC as a flat tuple: the bits of the index spread over red, green and blue.

    Example:
        >>> palette()[3:9]
        (128, 0, 0, 0, 128, 0)
    """
    colors = np.zeros((256, 3), dtype=np.uint8)
    index = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return tuple(int(v) for v in colors.reshape(-1))


def _text_of(image: PngImageFile) -> _Text | None:
    """Return the text of an image that was opened; None if it has none."""
    parts = str(image.info.get(_TEXT, "")).split(" ")
    return _Text(*parts) if len(parts) == len(_Text._fields) else None


def _settings_of(image: PngImageFile) -> dict[str, Any] | None:
    """Return the settings in the text of an image that was opened; None if it has none."""
    try:
        settings = json.loads(str(image.info.get(_SETTINGS, "")))
    except (ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


def _pixels_of(image: PngImageFile, path: Path) -> Pixels | None:
    """Return the pixels of an image that was opened; None if its file is cut off or broken."""
    try:
        return np.array(image) if _has_end(path) else None
    except Exception:  # PIL raises many types for a broken file
        return None


def _has_end(path: Path) -> bool:
    """Return whether a file ends as a PNG does."""
    with open(path, "rb") as file:
        file.seek(-12, os.SEEK_END)
        return file.read(8)[4:] == b"IEND"


def _refuse_other(path: Path, text: _Text | None, origin: str, name: str) -> None:
    if not origin or (text is not None and text.seal == seal(origin, name, text.digest, text.image)):
        return
    none = text is None
    what = "was not written by this labeling" if none else "was written by another labeling, or under another name"
    raise damaged(path, what, to=LABEL_AGAIN)


def _digest(pixels: Pixels) -> str:
    return seal(list(pixels.shape), pixels.dtype.str, np.ascontiguousarray(pixels).data.cast("B"))
