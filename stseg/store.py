"""Pseudo-masks by id: in memory, or as PNG files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stseg.errors import DataError, UnreadableImageError, WorkdirMismatchError
from stseg.files import write_atomically

_CONFIDENCE = ".confidence"


class MaskStore:
    """Masks by id, with their confidence where that is kept too.

    On disk, the mask of id ``a/b`` is ``a/b.png`` in the folder: an 8-bit palette PNG whose indices are the classes
    (16-bit grey for masks that are not uint8); its confidence is ``a/b.confidence.png``, 16-bit grey, 65535 standing for 1.
    A process killed at any moment leaves whole files only.

    Args:
        folder: where the files go; made when the first mask comes. ``None`` keeps everything in memory.

    Example:
        >>> store = MaskStore()
        >>> store["scene/0001"] = torch.zeros(4, 6, dtype=torch.uint8)
        >>> store["scene/0001"].shape, "scene/0002" in store, len(store)
        (torch.Size([4, 6]), False, 1)
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"the store {self.folder} is a file; expected a folder")
        self._masks: dict[str, Tensor] = {}
        self._confidence: dict[str, Tensor] = {}
        self._owner: dict[str, Any] | None = None

    def put(self, id: str, mask: Tensor, confidence: Tensor | None = None) -> None:
        """Keep a mask under an id, in place of what is there.

        Args:
            id: name of the image; slashes make folders.
            mask: ``(H, W)`` integer class indices, 0..65535 on disk.
            confidence: ``(H, W)`` floats in [0, 1], or None.

        Raises:
            DataError: if the id would leave the store or the mask cannot be kept.
        """
        check_store_id(id)
        if mask.ndim != 2 or mask.is_floating_point():
            raise DataError(f"mask of {id!r} is {mask.dtype} of shape {tuple(mask.shape)}; expected integer (H, W)")
        mask = mask.detach().cpu()
        confidence = None if confidence is None else confidence.detach().float().cpu()
        if confidence is not None and confidence.shape != mask.shape:
            raise DataError(
                f"confidence of {id!r} has shape {tuple(confidence.shape)}; expected {tuple(mask.shape)}"
            )
        if self.folder is None:
            self._masks[id] = mask.clone()
            self._confidence.pop(id, None)
            if confidence is not None:
                self._confidence[id] = confidence.clone()
            return
        path = self._path(id)
        # The mask comes last: where there is a mask, everything that belongs to it is there.
        beside = self._path(id + _CONFIDENCE)
        if confidence is not None:
            grey = (confidence.clamp(0, 1).double().numpy() * 65535).round().astype(np.uint16)
            _write_png(Image.fromarray(grey), beside)
        else:
            beside.unlink(missing_ok=True)
        _write_png(_as_png(mask, id), path)

    def get(self, id: str) -> Tensor:
        """The mask of an id, ``(H, W)`` uint8 or int32.

        Raises:
            KeyError: if there is none.
            UnreadableImageError: if its file is broken.
        """
        if self.folder is None:
            return self._masks[id]
        array = _read_png(self._path(id), id)
        return torch.from_numpy(array if array.dtype == np.uint8 else array.astype(np.int32))

    def confidence(self, id: str) -> Tensor:
        """The confidence kept with a mask, ``(H, W)`` float32 (in steps of 1/65535 from disk).

        Raises:
            KeyError: if there is none.
            UnreadableImageError: if its file is broken.
        """
        if self.folder is None:
            return self._confidence[id]
        return torch.from_numpy((_read_png(self._path(id + _CONFIDENCE), id) / 65535.0).astype(np.float32))

    def holds(self, id: str, *, confidence: bool = False) -> bool:
        """Whether the mask (and its confidence, where asked for) is there and its file is not broken."""
        check_store_id(id)
        if self.folder is None:
            return id in self._masks and (not confidence or id in self._confidence)
        return all(_intact(self._path(name)) for name in ([id, id + _CONFIDENCE] if confidence else [id]))

    def claim(self, owner: dict[str, Any]) -> None:
        """Say who fills this store, so that masks of two labellers are never taken for one another's.

        On disk this is kept in ``labels.json``.

        Args:
            owner: description of the labeller, of JSON's types.

        Raises:
            WorkdirMismatchError: if another one has filled it, or it holds masks of unknown origin.
        """
        owner = json.loads(json.dumps(owner))
        found = self._owner
        record = None if self.folder is None else self.folder / "labels.json"
        if record is not None and record.exists():
            try:
                found = json.loads(record.read_text())
            except ValueError:
                raise WorkdirMismatchError(f"{record} is not readable as JSON; remove the folder to label anew") from None
        where = self.folder or "the store"
        if found is None and next(iter(self), None) is not None:
            raise WorkdirMismatchError(f"{where} holds masks of unknown origin; use an empty folder")
        if found is not None and found != owner:
            keys = [key for key in {**found, **owner} if found.get(key) != owner.get(key)]
            differences = "; ".join(f"{k}: {found.get(k)!r} there, {owner.get(k)!r} now" for k in keys)
            raise WorkdirMismatchError(
                f"{where} holds masks of another labeller ({differences}); use another folder, or remove it"
            )
        self._owner = owner
        if record is not None and found is None:
            write_atomically(record, lambda file: file.write(json.dumps(owner, indent=1).encode()))

    def __getitem__(self, id: str) -> Tensor:
        return self.get(id)

    def __setitem__(self, id: str, mask: Tensor) -> None:
        self.put(id, mask)

    def __contains__(self, id: object) -> bool:
        if not isinstance(id, str):
            return False
        check_store_id(id)
        return id in self._masks if self.folder is None else self._path(id).is_file()

    def __iter__(self) -> Iterator[str]:
        """The ids that have a mask: in memory in the order they came, on disk in no particular one."""
        if self.folder is None:
            yield from self._masks
            return
        for root, _, files in os.walk(self.folder):
            for name in files:
                stem, suffix = os.path.splitext(name)
                if suffix == ".png" and not name.startswith(".") and not stem.endswith(_CONFIDENCE):
                    yield (Path(root) / stem).relative_to(self.folder).as_posix()

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"MaskStore({'' if self.folder is None else repr(str(self.folder))})"

    def _path(self, id: str) -> Path:
        assert self.folder is not None
        check_store_id(id.removesuffix(_CONFIDENCE))
        return self.folder / f"{id}.png"


def check_store_id(id: str) -> None:
    """Raise a ``DataError`` unless the id names a file inside a folder, on every system.

    Example:
        >>> check_store_id("../secret")
        Traceback (most recent call last):
        stseg.errors.DataError: the id '../secret' cannot name a file in a store; ...
    """
    parts = id.split("/")
    if (
        any(part in ("", ".", "..") or part.startswith(".") and part.endswith(".part") for part in parts)
        or "\\" in id
        or PureWindowsPath(id).drive
        or PurePosixPath(id).is_absolute()
        or any(ord(c) < 32 for c in id)
        or any(len(part.encode()) > 255 - len(_CONFIDENCE + ".png") for part in parts)
        or id.endswith(_CONFIDENCE)
    ):
        raise DataError(
            f"the id {id!r} cannot name a file in a store; expected a relative path with '/' between folders, "
            f"without '.' or '..', backslashes, control characters or the ending {_CONFIDENCE!r}"
        )


def palette() -> list[int]:
    """256 colours as a flat list of RGB values: those of Pascal VOC, in which the bits of the index are spread over the channels.

    Example:
        >>> palette()[3:9]
        [128, 0, 0, 0, 128, 0]
    """
    colours = np.zeros((256, 3), dtype=np.uint8)
    index = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return [int(v) for v in colours.reshape(-1)]


_palette = lru_cache(palette)


def _as_png(mask: Tensor, id: str) -> Image.Image:
    if mask.dtype in (torch.uint8, torch.bool):
        image = Image.fromarray(mask.to(torch.uint8).numpy())
        image.putpalette(_palette())
        return image
    if mask.numel() and (int(mask.min()) < 0 or int(mask.max()) > 65535):
        raise DataError(
            f"mask of {id!r} holds values from {int(mask.min())} to {int(mask.max())}; "
            "expected 0..65535 for a PNG (choose another ignore_index)"
        )
    return Image.fromarray(mask.numpy().astype(np.uint16))


def _write_png(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda file: image.save(file, format="PNG", compress_level=3))


def _read_png(path: Path, id: str) -> np.ndarray[Any, np.dtype[Any]]:
    try:
        with Image.open(path) as image:
            return np.array(image)
    except FileNotFoundError:
        raise KeyError(id) from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UnreadableImageError(f"{path} cannot be read as a PNG: {error}") from error


def _intact(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.verify()  # the check sums of all its parts, without decoding them
        with open(path, "rb") as file:
            file.seek(-12, os.SEEK_END)
            return file.read(8)[4:] == b"IEND"
    except (OSError, SyntaxError, ValueError):
        return False
