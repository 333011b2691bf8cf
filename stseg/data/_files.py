"""The files of a folder and of those below it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from stseg.data._reading import MASK_SUFFIXES, check_folder
from stseg.errors import DataError

_IMAGES = ".jpg .jpeg .jpe .jfif .jp2 .png .bmp .tif .tiff .webp .gif .avif .ppm .pgm .pnm"
_OF_WINDOWS = ("desktop.ini", "thumbs.db")


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of images, as far as the installed Pillow reads them."""
    return frozenset(_IMAGES.split()) & Image.registered_extensions().keys()


class Found(NamedTuple):
    """Files in a folder.

    Attributes:
        files: the suffix of each file by its id, the path in the folder without suffix.
        unfit: the suffix of each file whose format was asked to be recorded, by its id.
        left_out: number of the other files, by suffix in lower case.
        links: id prefix of each linked folder that was searched under another name, and the prefix there.
    """

    files: dict[str, str]
    unfit: dict[str, str]
    left_out: dict[str, int]
    links: dict[str, str]

    def without_end(self, end: str) -> Found:
        """Return the files whose names end with ``end``, without it."""
        if not end:
            return self
        files, unfit = (
            {id[: -len(end)]: suffix for id, suffix in part.items() if id.endswith(end)} for part in self[:2]
        )
        return self._replace(files=files, unfit=unfit)

    def linked(self, id: str) -> str:
        """Return the id under which a file was found that lies behind a link."""
        for _ in self.links:
            link = next((link for link in self.links if id.startswith(link)), None)
            if link is None:
                break
            id = self.links[link] + id[len(link) :]
        return id

    def linked_all(self, ids: Sequence[str]) -> Sequence[str]:
        """Return the ids under which files were found."""
        return [self.linked(id) for id in ids] if self.links else ids


def scan(root: Path, kinds: frozenset[str], *, unfit: frozenset[str] = frozenset(), end: str = "") -> Found:
    """Find the files below a folder that have one of the suffixes ``kinds`` and whose id ends with ``end``.

    Raises:
        DataError: if the folder is missing, or two files have the same id; names them.
    """
    check_folder(root)
    found = Found({}, {}, {}, {})
    files = found.files
    for prefix, names in _folders(root, found.links):
        for name in names:
            if name[0] == ".":
                continue
            dot = name.rfind(".")  # os.path.splitext takes three times as long
            stem, suffix = (name[:dot], name[dot:]) if dot > 0 else (name, "")
            if suffix.lower() not in kinds:
                _leave_out(name, prefix + stem, suffix, found, unfit)
                continue
            if end and not stem.endswith(end):
                continue
            id = prefix + stem
            if id in files:
                raise DataError(
                    f"{root / (id + files[id])} and {root / (id + suffix)} have the same id {id!r}; "
                    f"expected one file for each{_pairs_line(root, files[id], suffix)}"
                )
            files[id] = sys.intern(suffix)
    return found


def names_of_images(root: Path) -> list[tuple[str, str]]:
    """Return path without suffix, and suffix, of all images below a folder; two may have the same path."""
    split = (
        os.path.splitext(prefix + name) for prefix, names in _folders(root, {}) for name in names if name[0] != "."
    )
    return [(stem, suffix) for stem, suffix in split if suffix.lower() in image_suffixes()]


def pairs_line(root: Path, image: str, mask: str) -> str:
    """Return the code that pairs the files of two suffixes."""
    return (
        f"root = Path({str(root.resolve())!r}); stseg.data.ListedFiles(root, "
        f"[(mask.with_suffix({image!r}), mask) for mask in sorted(root.rglob({'*' + mask!r}))])"
    )


def _pairs_line(root: Path, *suffixes: str) -> str:
    mask = [suffix for suffix in suffixes if suffix.lower() in MASK_SUFFIXES]
    image = [suffix for suffix in suffixes if suffix.lower() not in MASK_SUFFIXES]
    if not (mask and image):
        return ""
    return (
        f"; if the {mask[0]} files are the masks of the {image[0]} files, write {pairs_line(root, image[0], mask[0])}"
    )


def _leave_out(name: str, id: str, suffix: str, found: Found, unfit: frozenset[str]) -> None:
    kind = suffix.lower()
    if kind in unfit:
        found.unfit.setdefault(id, sys.intern(suffix))
    if name.lower() not in _OF_WINDOWS:
        found.left_out[kind] = found.left_out.get(kind, 0) + 1


def _folders(root: Path, links: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yield id prefix and file names of each folder; none twice, those behind links last."""
    seen: dict[str, str] = {}
    top = os.path.realpath(root)
    tasks = [("", top)]
    while tasks:
        later: list[tuple[str, str]] = []
        for start, real in sorted(tasks):
            for folder, subfolders, names in os.walk(root / start, onerror=_reraise):
                inside = os.path.relpath(folder, root / start)
                prefix = start if inside == "." else f"{start}{Path(inside).as_posix()}/"
                place = real if inside == "." else os.path.join(real, inside)
                if place in seen:
                    links[prefix] = seen[place]
                    subfolders.clear()
                    continue
                seen[place] = prefix
                visible = [name for name in subfolders if not name.startswith(".")]
                linked = {name for name in visible if os.path.islink(os.path.join(folder, name))}
                subfolders[:] = [name for name in visible if name not in linked]
                targets = ((f"{prefix}{name}/", os.path.realpath(os.path.join(folder, name))) for name in linked)
                later += [(link, target) for link, target in targets if not _above(target, place, top)]
                yield prefix, names
        tasks = later


def _above(folder: str, *others: str) -> bool:
    """Whether one of the others lies in the folder; a link to the folder of the link itself is in ``seen``."""
    return any(other != folder and other.startswith(folder.rstrip(os.sep) + os.sep) for other in others)


def _reraise(error: OSError) -> None:
    raise error
