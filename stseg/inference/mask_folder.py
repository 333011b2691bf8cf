"""Folders of plain gray PNG masks, each of which holds what it was made from."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stseg.data._files import image_suffixes
from stseg.distributed import all_gather, rank
from stseg.errors import DamagedFileError, DataError, StsegError, WorkdirMismatchError
from stseg.inference.mask_files import Pixels, Written, read_written, write_png
from stseg.inference.store_ids import CONFIDENCE, check_file_names
from stseg.progress import progress_bar
from stseg.storage.records import as_json, diff
from stseg.storage.seals import seal

_AT_ONCE = 256  # files that threads are given


class Wrong(NamedTuple):
    """File that is not to be overwritten."""

    path: Path
    error: type[StsegError]
    what: str


class MaskFolder:
    """Folder of masks by id, and optionally one beside it of their confidence.

    The mask of id ``a/b`` is ``a/b.png`` in the folder, 8- or 16-bit gray, and holds, as text, its settings, a checksum
    of its image and a digest of all that and its pixels. No other file is written.

    Args:
        folder: folder of the masks.
        settings: what the masks depend on besides the images, JSON-serializable.
        ids: ids of the images; an ending of image files is not part of the name of a mask.
        confidence: folder of the confidence, 8-bit gray; None for none.

    Raises:
        DataError: if an id cannot name a file, or two ids would name the same one; names them.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], ids: Sequence[str], confidence: Path | None = None
    ) -> None:
        self.folder, self.confidence = folder, confidence
        self._ids, self._settings = ids, as_json(settings)
        self._origin = seal(self._settings)
        self._refuse_twins()
        names = [_without_suffix(id) for id in ids]
        for each in self.folders:
            check_file_names(names, each)

    @property
    def folders(self) -> list[Path]:
        """The folders that are written to."""
        return [self.folder] if self.confidence is None else [self.folder, self.confidence]

    def put(self, id: str, mask: Pixels, confidence: Pixels | None, *, image: int) -> None:
        """Write a mask ``(H, W)``, uint8 or uint16, and its confidence ``(H, W)`` in [0, 1], with the image's checksum.

        The mask is written last: if it is there, so is its confidence.
        """
        name = _without_suffix(id)
        write = partial(write_png, origin=self._origin, image=image, gray=True, settings=self._settings)
        if self.confidence is not None and confidence is not None:
            gray = (confidence.clip(0, 1) * 255).round().astype(np.uint8)
            write(gray, _file(self.confidence, name), name=name + CONFIDENCE)
        write(mask, _file(self.folder, name), name=name)

    def get(self, id: str) -> Pixels:
        """Return the mask of an id as it was written.

        Raises:
            DataError: if it is missing.
            DamagedFileError: if it was changed or cut off.
            WorkdirMismatchError: if something else wrote it.
        """
        name = _without_suffix(id)
        path = _file(self.folder, name)
        try:
            written = read_written(path, name=name)
        except FileNotFoundError:
            raise DataError(f"{path} is missing; predict again to make it") from None
        if (wrong := self._wrong(path, written)) is not None:
            raise _refusal([wrong])
        if written.pixels is None:
            raise DamagedFileError(f"{path} is cut off or broken; predict again to make it")
        return written.pixels

    def made(self, indices: Sequence[int], *, show: bool) -> dict[int, int]:
        """Find the masks that are there, whole, and made with these settings.

        All PNG files in the folders are opened, the processes share them, and each gets the same error.

        Args:
            indices: of the ids of this process.
            show: whether to show a bar.

        Returns:
            The checksum of the image of each mask that is there, by index.

        Raises:
            WorkdirMismatchError: if something else wrote a file, or the same with other settings; names it.
            DamagedFileError: if one was changed after it was written.
        """
        made: dict[int, int] = {}
        wrong: list[Wrong] = []
        count = 0
        there = [index for index in indices if any(os.path.exists(path) for path, _ in self._files(self._ids[index]))]
        others = self._others() if rank() == 0 else iter(())
        bar = progress_bar(title="check masks", total=len(there), show=show and bool(there), unit="mask")
        with ThreadPoolExecutor(4) as threads, bar:
            for index, found in _map(threads, self._check, chain(there, others)):
                bar.update()
                if isinstance(found, Wrong):
                    count += 1
                    wrong = wrong or [found]
                elif isinstance(index, int) and found is not None:
                    made[index] = found
        counts = all_gather((count, wrong))
        if first := [each for _, part in counts for each in part][:1]:
            raise _refusal(first, sum(part for part, _ in counts))
        return made

    def _check(self, item: int | tuple[Path, str]) -> Wrong | int | None:
        """Return the checksum of the image of a mask, or what is wrong; None if a file has to be made (again)."""
        files = self._files(self._ids[item]) if isinstance(item, int) else [item]
        image: int | None = None
        whole = True
        for path, name in files:
            try:
                if not os.path.isdir(path) and os.stat(path).st_size == 0:
                    raise FileNotFoundError
                written = read_written(path, name=name)
            except FileNotFoundError:
                whole = False
                continue
            if (wrong := self._wrong(path, written)) is not None:
                return wrong
            same = image is None or image == written.image
            image, whole = written.image, whole and same and written.pixels is not None
        return image if whole else None

    def _wrong(self, path: Path, written: Written) -> Wrong | None:
        if written.settings is None:
            return Wrong(path, WorkdirMismatchError, "was not written there by stseg.predict")
        if differences := diff(written.settings, self._settings):
            what = f"was made with other settings or weights: {'; '.join(differences)}"
            return Wrong(path, WorkdirMismatchError, what)
        return Wrong(path, DamagedFileError, "was changed after it was written") if written.changed else None

    def _files(self, id: str) -> list[tuple[Path, str]]:
        """Return path and sealed name of the files of an id."""
        name = _without_suffix(id)
        return [(_file(each, name), name + end) for each, end in zip(self.folders, ("", CONFIDENCE), strict=False)]

    def _others(self) -> Iterator[tuple[Path, str]]:
        """Yield path and sealed name of the PNG files that are not of the ids."""
        own = {_without_suffix(id) for id in self._ids}
        for folder, end in zip(self.folders, ("", CONFIDENCE), strict=False):
            for root, folders, files in os.walk(folder):
                folders[:] = [name for name in folders if not name.startswith(".")]
                for file in files:
                    if file.lower().endswith(".png") and not file.startswith("."):
                        path = Path(root, file)
                        name = path.relative_to(folder).as_posix()
                        if name[: -len(".png")] not in own or not name.endswith(".png"):
                            yield path, name.removesuffix(".png") + end

    def _refuse_twins(self) -> None:
        of: dict[str, str] = {}
        for id in self._ids:
            other = of.setdefault(_without_suffix(id), id)
            if other != id:
                raise DataError(
                    f"the masks of {other!r} and {id!r} would both be {_file(self.folder, _without_suffix(id))}; "
                    "expected names that differ in more than the ending: rename one, or give the data set other .ids"
                )


def classes_of(pixels: Pixels, values: Sequence[int] | None) -> Tensor:
    """Return the class of each number in a mask; the numbers themselves if there are no values.

    Returns:
        ``(H, W)`` uint8, or int32 where there are more than 256 classes.

    Example:
        >>> classes_of(np.array([[0, 255]], dtype=np.uint8), (0, 255))
        tensor([[0, 1]], dtype=torch.uint8)
    """
    if values is not None:
        table = np.zeros(max(values) + 1, dtype=np.uint8 if len(values) <= 256 else np.uint16)
        table[list(values)] = np.arange(len(values))
        pixels = table[pixels]
    return torch.from_numpy(pixels if pixels.dtype == np.uint8 else pixels.astype(np.int32))


def _refusal(wrong: list[Wrong], count: int = 1) -> StsegError:
    (path, error, what), *_ = wrong
    delete = str(path) if count == 1 else f"all {count} files of this kind"
    return error(f"{path} {what}; use another folder, or delete {delete} to predict again")


def _map(threads: ThreadPoolExecutor, function: Any, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield each item and its result; a few items at once, where ``map`` would take all."""
    items = iter(items)
    while part := list(islice(items, _AT_ONCE)):
        yield from zip(part, threads.map(function, part), strict=True)


def _without_suffix(id: str) -> str:
    """Return an id without the ending of an image file, such as ``.jpg``."""
    stem, suffix = os.path.splitext(id)
    return stem if suffix.lower() in image_suffixes() else id


def _file(folder: Path, name: str) -> Path:
    return Path(folder, f"{name}.png")
