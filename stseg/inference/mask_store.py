"""Pseudo-masks by id: in memory, or as PNG files that are written atomically."""

from __future__ import annotations

import ntpath
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from stseg.data.convert import as_mask
from stseg.errors import DataError, UnreadableImageError, WorkdirMismatchError
from stseg.storage.files import absolute_folder, write_atomically
from stseg.storage.records import claim, merge_claim, read_record

_CONFIDENCE = ".confidence"
_LONGEST_PART = 255 - len(_CONFIDENCE + ".png")  # limit of file systems


class MaskStore:
    """Store of masks by id, optionally with their confidence.

    On disk, the mask of id ``a/b`` is ``a/b.png`` in the folder: an 8-bit palette PNG whose indices are the
    classes (16-bit gray for masks that are not uint8); its confidence is ``a/b.confidence.png``, 16-bit gray,
    where 65535 is 1. Files are written atomically.

    Args:
        folder: folder of the files, created with the first mask. ``None`` keeps everything in memory.

    Example:
        >>> store = MaskStore()
        >>> store["scene/0001"] = torch.zeros(4, 6, dtype=torch.uint8)
        >>> store["scene/0001"].shape, "scene/0002" in store, len(store)
        (torch.Size([4, 6]), False, 1)
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = absolute_folder(folder, "the store")
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"the store {self.folder} is a file; expected a folder")
        self._masks: dict[str, Tensor] = {}
        self._confidence: dict[str, Tensor] = {}
        self._owner: dict[str, Any] | None = None

    def put(self, id: str, mask: Tensor, confidence: Tensor | None = None) -> None:
        """Store a mask under an id, replacing any earlier one.

        Args:
            id: name of the image; slashes make folders.
            mask: ``(H, W)`` integer class indices, 0..65535 on disk.
            confidence: ``(H, W)`` floats in [0, 1], or None.

        Raises:
            DataError: if the id would leave the store, or the mask cannot be stored.
            TypeError: if the mask is floating-point.
        """
        check_store_id(id)
        mask = as_mask(mask, name=id).cpu()
        if confidence is not None:
            confidence = confidence.detach().float().cpu()
            _check_confidence(confidence, mask, id)
        if self.folder is None:
            self._masks[id] = mask.clone()
            self._confidence.pop(id, None)
            if confidence is not None:
                self._confidence[id] = confidence.clone()
            return
        # The mask is written last: if it exists, so does its confidence.
        png = _as_png(mask, id)
        beside = self._path(id, _CONFIDENCE)
        if confidence is None:
            beside.unlink(missing_ok=True)
        else:
            gray = (confidence.clamp(0, 1).double().numpy() * 65535).round().astype(np.uint16)
            _write_png(Image.fromarray(gray), beside)
        _write_png(png, self._path(id))

    def get(self, id: str) -> Tensor:
        """Return a copy of the mask of an id, ``(H, W)`` uint8 or int32.

        Raises:
            KeyError: if there is none.
            UnreadableImageError: if its file is broken.
        """
        if self.folder is None:
            return self._masks[id].clone()
        return as_mask(_read_png(self._path(id), id), name=id)

    def confidence(self, id: str) -> Tensor:
        """Return a copy of the confidence of a mask, ``(H, W)`` float32 (in steps of 1/65535 from disk).

        Raises:
            KeyError: if there is none.
            UnreadableImageError: if its file is broken.
        """
        if self.folder is None:
            return self._confidence[id].clone()
        return torch.from_numpy((_read_png(self._path(id, _CONFIDENCE), id) / 65535.0).astype(np.float32))

    def holds(self, id: str, *, confidence: bool = False) -> bool:
        """Return whether the mask, and with ``confidence`` its confidence, exists and is not broken."""
        check_store_id(id)
        if self.folder is None:
            return id in self._masks and (not confidence or id in self._confidence)
        return _intact(self._path(id)) and (not confidence or _intact(self._path(id, _CONFIDENCE)))

    def claim(self, owner: dict[str, Any], *, images: dict[str, int] | None = None) -> None:
        """Record the labeler that fills this store, so that masks of different labelers are not mixed.

        On disk the record is ``labels.json``.

        Args:
            owner: description of the labeler, JSON-serializable.
            images: checksums of some of the images, by id.

        Raises:
            WorkdirMismatchError: if the store was filled by another labeler, with masks of other images under the same
                ids, or from an unknown origin.
        """
        where = self.folder or "the store"
        record = None if self.folder is None else self.folder / "labels.json"
        found = self._owner if record is None else read_record(record)
        if found is None and next(iter(self), None) is not None:
            raise WorkdirMismatchError(f"{where} holds masks of unknown origin; use an empty folder")
        self._owner = (
            merge_claim(found, owner, images, where=where) if record is None else claim(record, owner, images=images)
        )

    def __getitem__(self, id: str) -> Tensor:
        return self.get(id)

    def __setitem__(self, id: str, mask: Tensor) -> None:
        self.put(id, mask)

    def __contains__(self, id: object) -> bool:
        if not isinstance(id, str) or not _is_store_id(id):
            return False
        return id in self._masks if self.folder is None else self._path(id).is_file()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids that have a mask: in insertion order in memory, in arbitrary order on disk."""
        if self.folder is None:
            yield from self._masks
            return
        for root, _, files in os.walk(self.folder):
            for name in files:
                if name.endswith(".png") and not name.endswith(f"{_CONFIDENCE}.png"):
                    yield (Path(root) / name[: -len(".png")]).relative_to(self.folder).as_posix()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"MaskStore({'' if self.folder is None else repr(str(self.folder))})"

    def _path(self, id: str, ending: str = "") -> Path:
        assert self.folder is not None
        check_store_id(id)
        return self.folder / f"{id}{ending}.png"


def check_store_id(id: str) -> None:
    """Raise a ``DataError`` unless the id is a valid file name inside a folder on every system.

    Example:
        >>> check_store_id("../secret")
        Traceback (most recent call last):
        stseg.errors.DataError: the id '../secret' cannot name a file in a store; ...
    """
    if not _is_store_id(id):
        raise DataError(
            f"the id {id!r} cannot name a file in a store; expected a relative path with '/' between folders "
            "and without '.' or '..', drives, backslashes, control characters, parts of more than "
            f"{_LONGEST_PART} bytes or the ending {_CONFIDENCE!r}"
        )


def _is_store_id(id: str) -> bool:
    try:
        parts = id.encode().split(b"/")
    except UnicodeEncodeError:  # a file name that was not valid UTF-8
        return False
    return not (
        any(part in (b"", b".", b"..") or len(part) > _LONGEST_PART for part in parts)
        or "\\" in id
        or ntpath.splitdrive(id)[0]
        or any(ord(c) < 32 for c in id)
        or id.endswith(_CONFIDENCE)
    )


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


def _check_confidence(confidence: Tensor, mask: Tensor, id: str) -> None:
    if confidence.shape != mask.shape:
        raise DataError(f"confidence of {id!r} has shape {tuple(confidence.shape)}; expected {tuple(mask.shape)}")
    low, high = (float(v) for v in torch.aminmax(confidence))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise DataError(f"confidence of {id!r} holds values from {low:g} to {high:g}; expected [0, 1]")


def _as_png(mask: Tensor, id: str) -> Image.Image:
    if mask.dtype == torch.uint8:
        image = Image.fromarray(mask.numpy())
        image.putpalette(palette())
        return image
    low, high = (int(v) for v in torch.aminmax(mask))
    if low < 0 or high > 65535:
        raise DataError(
            f"mask of {id!r} holds values from {low} to {high}; expected 0..65535 for a PNG "
            "(choose another ignore_index)"
        )
    return Image.fromarray(mask.numpy().astype(np.uint16))


def _write_png(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda file: image.save(file, format="PNG", compress_level=3))


def _read_png(path: Path, id: str) -> np.ndarray[Any, np.dtype[Any]]:
    try:
        # Not Image.open: its limit on the number of pixels is meant for untrusted files.
        with PngImageFile(path) as image:
            return np.array(image)
    except FileNotFoundError:
        raise KeyError(id) from None
    except Exception as error:  # PIL raises many types for a broken file
        raise UnreadableImageError(f"{path} cannot be read as a PNG: {error}") from error


def _intact(path: Path) -> bool:
    try:
        with PngImageFile(path) as image:
            image.verify()  # verifies the checksums of all chunks without decoding them
        with open(path, "rb") as file:
            file.seek(-12, os.SEEK_END)
            return file.read(8)[4:] == b"IEND"
    except Exception:  # PIL raises many types for a broken file
        return False
