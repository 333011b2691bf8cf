"""Ids of images as names of files that every common system can store."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

from stseg.data._names import nearest
from stseg.data.items import duplicate
from stseg.errors import DataError

CONFIDENCE = ".confidence"
ENDING = ".png"
RECORD = "labels.json"

_LONGEST_PART = 255  # bytes of UTF-8 on Linux and macOS; UTF-16 units on Windows, which are no more than the bytes
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
        raise _cannot_name(id, "store", fault)


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
        stseg.errors.DataError: some systems take the id 'A/1' for that of another image; 'a/1' is there, which ...
    """
    for id in ids:
        check_store_id(id)
    _refuse_alike(ids)
    _refuse_files_as_folders(ids)
    if folder is not None:
        _refuse_long_paths(ids, folder)


def check_file_names(names: Sequence[str], folder: Path) -> None:
    """Check names of files in a folder that is no store, without their ending: no name is reserved.

    Raises:
        DataError: as :func:`check_store_ids` does.

    Example:
        >>> check_file_names(["shard-00/1", "1.confidence"], Path("masks"))
        >>> check_file_names(["../secret"], Path("masks"))
        Traceback (most recent call last):
        stseg.errors.DataError: the id '../secret' cannot name a file in a folder: it has a part '..'; expected ...
    """
    for name in names:
        if (fault := _fault_of_path(name, ENDING)) is not None:
            raise _cannot_name(name, "folder", fault)
    _refuse_alike(names)
    _refuse_files_as_folders(names)
    _refuse_long_paths(names, folder)


def _cannot_name(id: str, where: str, fault: str) -> DataError:
    return DataError(
        f"the id {id!r} cannot name a file in a {where}: {fault}; expected a relative path with '/' between folders, "
        "of names that Linux, macOS and Windows can store: rename the image, or give the data set other .ids"
    )


def _fault(id: str) -> str | None:
    """Return what is wrong with an id, if anything is."""
    if len(id) < 100 and _PLAIN.fullmatch(id) and not id.lower().startswith((*_LIKE_DEVICE, "shard-")):
        lower = id.lower()
        if not any(f"/{name}" in lower for name in _LIKE_DEVICE) and not lower.endswith(CONFIDENCE):
            return None
    return _slow_fault(id)


def _slow_fault(id: str) -> str | None:
    if (fault := _fault_of_path(id, CONFIDENCE + ENDING)) is not None:
        return fault
    parts = id.split("/")
    if _folded(id).endswith(CONFIDENCE):
        return f"it ends with {CONFIDENCE!r}" + (", in other letters" if not id.lower().endswith(CONFIDENCE) else "")
    if _SHARD.match(parts[0]):
        return f"its part {parts[0]!r} looks like a folder of the store"
    if len(parts) > 1 and _folded(parts[0]) == RECORD:
        return f"its folder {parts[0]!r} is a file of the store"
    return None


def _fault_of_path(id: str, ending: str) -> str | None:
    """Return what is wrong with a path, if anything is, with an ending behind its last part."""
    if id == "":
        return "it is empty"
    *folders, name = id.split("/")
    faults = (_fault_of_part(part, end) for part, end in (*((folder, "") for folder in folders), (name, ending)))
    return next((fault for fault in faults if fault is not None), None)


def _fault_of_part(part: str, ending: str) -> str | None:
    """Return what is wrong with a name between slashes, if anything is, with an ending behind it."""
    if part in ("", ".", ".."):
        return f"it has a part {part!r}" if part else "it has an empty part"
    if (found := _FORBIDDEN.search(part)) is not None:
        return f"its part {part!r} contains {found[0]!r}"
    if part[-1] in ". ":
        return f"its part {part!r} ends with {part[-1]!r}"
    if _DEVICE.match(part):
        return f"its part {part!r} is the name of a device on Windows"
    try:
        size = len((part + ending).encode())
    except UnicodeEncodeError:
        return f"its part {part!r} is not valid Unicode (the name of its file is not UTF-8)"
    if size > _LONGEST_PART:
        return f"its part {part[:20] + '...'!r} is longer than {_LONGEST_PART} bytes" + (
            f", with {ending!r} behind it" if ending else ""
        )
    return None


def _refuse_alike(ids: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for id in ids:
        seen.setdefault(_folded(id), id)
    if len(seen) == len(ids):
        return
    if (twice := duplicate(ids)) is not None:
        raise DataError(f"the id {twice!r} occurs more than once; ids must be unique")
    id, other = next((id, other) for id in ids if (other := seen[_folded(id)]) != id)
    raise DataError(
        f"some systems take the id {id!r} for that of another image{nearest(id, [other])}: rename an image, or give "
        "the data set other .ids (id_prefix= of stseg.data.SegmentationFolder makes them differ between folders)"
    )


def _refuse_files_as_folders(ids: Sequence[str]) -> None:
    """Raise an error if the file of an id is the folder of another, as for ``x`` and ``x.png/y``."""
    inside: dict[str, str] = {}
    for id in ids:
        if f"{ENDING}/" in id.lower():
            inside.update((folder, id) for folder in _folders(_folded(id)))
    for id in ids if inside else ():
        for name in (id + ENDING, id + CONFIDENCE + ENDING):
            if (other := inside.get(_folded(name))) is not None:
                raise DataError(
                    f"the id {id!r} needs a file {name!r} where {other!r} needs a folder: rename one of them, or give "
                    "the data set other .ids"
                )


def _refuse_long_paths(ids: Sequence[str], folder: Path) -> None:
    """Raise an error if a path is too long for the file system, or has characters that it cannot take."""
    longest_path, longest_name = _limits(folder)
    before = len(_encoded(str(folder), "folder")) + len("/shard-00/")
    ending = len(CONFIDENCE + ENDING)
    for id in ids:
        name = _encoded(id, "id")
        if len(name) + ending <= longest_name and before + len(name) + _TEMPORARY <= longest_path:
            continue
        above, slash, last = name.rpartition(b"/")
        longest = max(len(last) + ending, _TEMPORARY)
        length = before + len(above + slash) + longest
        if length > longest_path or max(longest, *map(len, above.split(b"/"))) > longest_name:
            what = f"the path of its mask has {length} bytes" if length > longest_path else "a part of it is too long"
            raise DataError(
                f"the id {id!r} cannot name a file in {folder}: {what}; the file system takes paths of {longest_path} "
                f"and names of {longest_name} bytes: use a shorter folder, rename the image, or give the data set "
                "other .ids"
            )


def _encoded(name: str, what: str) -> bytes:
    try:
        return os.fsencode(name)
    except UnicodeEncodeError as error:
        raise DataError(
            f"the {what} {name!r} cannot name a file here: names of files are encoded as "
            f"{sys.getfilesystemencoding()}, which lacks {name[error.start]!r}; expected a UTF-8 locale "
            "(LC_ALL=C.UTF-8, or PYTHONUTF8=1)"
        ) from None


def _limits(folder: Path) -> tuple[int, int]:
    """Return the longest path and the longest name, in bytes, where a folder is or will be."""
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path) or path == path.parent)
    if not hasattr(os, "pathconf"):
        return (32_000 if sys.platform == "win32" else 4095), _LONGEST_PART
    try:
        limits = os.pathconf(there, "PC_PATH_MAX") - 1, os.pathconf(there, "PC_NAME_MAX")
    except (OSError, ValueError):
        return 4095, _LONGEST_PART
    # -1 stands for no limit, and some file systems in user space say 0.
    return limits[0] if limits[0] > 0 else sys.maxsize, limits[1] if limits[1] > 0 else sys.maxsize


def _folders(id: str) -> list[str]:
    parts = id.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _folded(name: str) -> str:
    folded = name.lower() if name.isascii() else normalize("NFC", normalize("NFC", name).casefold())
    return name if folded == name else folded  # which takes no further memory
