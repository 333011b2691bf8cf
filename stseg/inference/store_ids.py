"""Ids of images as names of files that every common system can store."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

from stseg.errors import DataError

CONFIDENCE = ".confidence"
ENDING = ".png"

_LONGEST_PART = 255  # bytes of UTF-8 on Linux and macOS; as many UTF-16 units on Windows
_TEMPORARY = len(".0123456789abcdef.part")
_PLAIN = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_,+=~-]*/)*[A-Za-z0-9_-][A-Za-z0-9_,+=~.-]*[A-Za-z0-9_-]|[A-Za-z0-9_-]")
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"\\|?*]')
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(?:\.|$)", re.IGNORECASE)
_SHARD = re.compile(r"shard-[0-9a-f]{2}$", re.IGNORECASE)
_LIKE_DEVICE = ("con", "prn", "aux", "nul", "com", "lpt")


def check_store_id(id: str) -> None:
    """Raise a ``DataError`` unless the id is a valid file name inside a folder on every common system.

    Example:
        >>> check_store_id("../secret")
        Traceback (most recent call last):
        stseg.errors.DataError: the id '../secret' cannot name a file in a store: it has a part '..'; expected ...
    """
    if (fault := _fault(id)) is not None:
        raise DataError(
            f"the id {id!r} cannot name a file in a store: {fault}; expected a relative path with '/' between folders, "
            "of names that Linux, macOS and Windows can store: rename the image, or give the data set other .ids"
        )


def is_store_id(id: str) -> bool:
    """Return whether :func:`check_store_id` accepts an id."""
    return _fault(id) is None


def check_store_ids(ids: Sequence[str], folder: Path | None = None) -> None:
    """Check ids of a data set before they name files in a folder.

    Args:
        ids: the ids.
        folder: the folder, which need not exist; None for a store in memory.

    Raises:
        DataError: if one cannot name a file in the folder, or two could not be told apart on some system; names them.

    Example:
        >>> check_store_ids(["a/1", "A/1"])
        Traceback (most recent call last):
        stseg.errors.DataError: the ids 'a/1' and 'A/1' differ only in letter case or Unicode form, which ...
    """
    for id in ids:
        check_store_id(id)
    _refuse_alike(ids)
    _refuse_files_as_folders(ids)
    if folder is not None:
        _refuse_long_paths(ids, folder)


def _fault(id: str) -> str | None:
    """Return what is wrong with an id, if anything is."""
    if len(id) < 100 and _PLAIN.fullmatch(id) and not id.lower().startswith((*_LIKE_DEVICE, "shard-")):
        lower = id.lower()
        if not any(f"/{name}" in lower for name in _LIKE_DEVICE) and not lower.endswith(CONFIDENCE):
            return None
    return _slow_fault(id)


def _slow_fault(id: str) -> str | None:
    try:
        id.encode()
    except UnicodeEncodeError:
        return "it is not valid Unicode (the name of its file is not UTF-8)"
    if (found := _FORBIDDEN.search(id)) is not None:
        return f"it contains {found[0]!r}"
    parts = id.split("/")
    for part in parts:
        last = part is parts[-1]
        if part in ("", ".", ".."):
            return f"it has a part {part!r}" if part else "it is empty, or has an empty part"
        if part[-1] in ". ":
            return f"its part {part!r} ends with {part[-1]!r}"
        if _DEVICE.match(part):
            return f"its part {part!r} is the name of a device on Windows"
        name = part + CONFIDENCE + ENDING if last else part
        if max(len(name.encode()), len(name.encode("utf-16-le")) // 2) > _LONGEST_PART:
            extra = f", with {CONFIDENCE + ENDING!r} behind it" if last else ""
            return f"its part {part[:20] + '...'!r} is longer than {_LONGEST_PART} bytes{extra}"
    if id.lower().endswith(CONFIDENCE):
        return f"it ends with {CONFIDENCE!r}"
    if _SHARD.match(parts[0]):
        return f"its part {parts[0]!r} looks like a folder of the store"
    return None


def _refuse_alike(ids: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for id in ids:
        if (other := seen.setdefault(_folded(id), id)) != id:
            raise DataError(
                f"the ids {other!r} and {id!r} differ only in letter case or Unicode form, which some systems do not "
                "tell apart: rename an image, or give the data set other .ids (id_prefix= of "
                "stseg.data.SegmentationFolder makes them differ between folders)"
            )


def _refuse_files_as_folders(ids: Sequence[str]) -> None:
    """Raise an error if the file of an id is the folder of another, as for ``x`` and ``x.png/y``."""
    inside = {folder for id in ids for folder in _folders(id) if folder.lower().endswith(ENDING)}
    if not inside:
        return
    folded = {_folded(folder) for folder in inside}
    for id in ids:
        for name in (id + ENDING, id + CONFIDENCE + ENDING):
            if _folded(name) in folded:
                raise DataError(
                    f"the mask of the id {id!r} is the file {name!r}, which is the folder of another id: rename one of "
                    "them, or give the data set other .ids"
                )


def _refuse_long_paths(ids: Sequence[str], folder: Path) -> None:
    """Raise an error if a path is too long for the file system, or has characters that it cannot take."""
    there = next(path for path in (folder, *folder.parents) if path.exists() or path == path.parent)
    longest_path, longest_name = _limits(there)
    for id in ids:
        try:
            name = os.fsencode(id)
        except UnicodeEncodeError:
            raise DataError(
                f"the id {id!r} cannot name a file here: names of files are encoded as {sys.getfilesystemencoding()}, "
                "which lacks a character of it; expected a UTF-8 locale (LC_ALL=C.UTF-8, or PYTHONUTF8=1)"
            ) from None
        ending = len(CONFIDENCE + ENDING)
        above, _, last = name.rpartition(b"/")
        parts = [*map(len, above.split(b"/")), len(last) + ending, _TEMPORARY]
        length = len(os.fsencode(folder)) + len("/shard-00/") + len(above) + 1 + max(parts[-2:])
        if length > longest_path or max(parts) > longest_name:
            what = f"the path of its mask has {length} bytes" if length > longest_path else "a part of it is too long"
            raise DataError(
                f"the id {id!r} cannot name a file in {folder}: {what}; the file system takes paths of {longest_path} "
                f"and names of {longest_name} bytes: use a shorter workdir, rename the image, or give the data set "
                "other .ids"
            )


def _limits(folder: Path) -> tuple[int, int]:
    """Return the longest path and the longest name, in bytes, in a folder."""
    if not hasattr(os, "pathconf"):
        return (32_000 if sys.platform == "win32" else 4096), _LONGEST_PART
    try:
        return os.pathconf(folder, "PC_PATH_MAX") - 1, os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        return 4095, _LONGEST_PART


def _folders(id: str) -> list[str]:
    parts = id.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _folded(name: str) -> str:
    return name.lower() if name.isascii() else normalize("NFC", normalize("NFC", name).casefold())
