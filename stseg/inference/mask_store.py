"""Pseudo-masks by id: in memory, or as PNG files that are written atomically."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from stseg.checks import check_choice
from stseg.data.convert import as_mask
from stseg.errors import DamagedFileError, DataError, WorkdirMismatchError
from stseg.inference.mask_files import LABEL_AGAIN, Pixels, holds_png, read_png, write_png
from stseg.inference.store_ids import CONFIDENCE, check_store_id, check_store_ids, is_store_id
from stseg.storage.files import absolute_folder
from stseg.storage.records import claim, merge_claim, owner_of, read_record
from stseg.storage.seals import damaged, seal

_MOST_IN_FOLDER = 10_000  # masks, before they are spread over folders
_MOST_VERIFIED = 10_000  # masks of a sample
_MOST_NAMED = 20  # files in a message
_SHARD = re.compile("shard-[0-9a-f]{2}/")
_LABEL_ALL = "label all images again"


class MaskStore:
    """Store of masks by id, optionally with their confidence.

    On disk, the mask of id ``a/b`` is ``a/b.png`` in the folder: an 8-bit palette PNG whose indices are the
    classes (16-bit gray for masks that are not uint8); its confidence is ``a/b.confidence.png``, 16-bit gray,
    where 65535 is 1. Files are written atomically, each with a digest of its pixels, its id and the labeler, which is
    checked when it is read. Labels of more than 10,000 images in one folder are spread over its subfolders ``shard-00``
    to ``shard-ff``.

    Args:
        folder: folder of the files, created with the first mask. ``None`` keeps everything in memory.
        verify: which masks a labeling that goes on opens, to see whether they are whole and its own: ``"sample"``,
            evenly spaced 10,000 of them or all if there are no more; ``"all"``; or ``"none"``. In any case each one is
            verified when it is read.

    Example:
        >>> store = MaskStore()
        >>> store["scene/0001"] = torch.zeros(4, 6, dtype=torch.uint8)
        >>> store["scene/0001"].shape, "scene/0002" in store, len(store)
        (torch.Size([4, 6]), False, 1)
    """

    def __init__(
        self, folder: str | Path | None = None, *, verify: Literal["sample", "all", "none"] = "sample"
    ) -> None:
        check_choice("verify", verify, "sample", "all", "none")
        self.verify, self._sharded = verify, False
        self.folder = absolute_folder(folder, "store")
        self._masks: dict[str, Tensor] = {}
        self._confidence: dict[str, Tensor] = {}
        self._owner: dict[str, Any] | None = None
        self._fills = False  # whether what is put is what the owner made

    def put(self, id: str, mask: Tensor, confidence: Tensor | None = None, *, image: int | None = None) -> None:
        """Store a mask under an id, replacing any earlier one.

        Args:
            id: name of the image; slashes make folders.
            mask: ``(H, W)`` integer class indices, 0..65535 on disk.
            confidence: ``(H, W)`` floats in [0, 1], or None.
            image: checksum of the image, by which :class:`stseg.PseudoLabeled` notices another one; kept on disk only.

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
        origin = self.origin if self._fills else ""
        # The mask is written last: if it exists, so does its confidence.
        pixels = _pixels_of(mask, id)
        beside = self._path(id, CONFIDENCE)
        if confidence is None:
            if beside.exists():
                beside.unlink()
        else:
            gray = (confidence.clamp(0, 1).double().numpy() * 65535).round().astype(np.uint16)
            write_png(gray, beside, origin=origin, name=id + CONFIDENCE)
        write_png(pixels, self._path(id), origin=origin, name=id, image=image)

    def get(self, id: str) -> Tensor:
        """Return a copy of the mask of an id, ``(H, W)`` uint8 or int32.

        Raises:
            KeyError: if there is none.
            DamagedFileError: if its file is damaged, or is not the one that the labeler wrote.
        """
        return self.get_with_image(id)[0]

    def get_with_image(self, id: str) -> tuple[Tensor, int | None]:
        """Return what :meth:`get` does, and the checksum of the image; None if it is not known."""
        if self.folder is None:
            return self._masks[id].clone(), None
        pixels, image = self._read(id)
        return as_mask(pixels, name=id), image

    def confidence(self, id: str) -> Tensor:
        """Return a copy of the confidence of a mask, ``(H, W)`` float32 (in steps of 1/65535 from disk).

        Raises:
            KeyError: if there is none.
            DamagedFileError: if its file is damaged, or is not the one that the labeler wrote.
        """
        if self.folder is None:
            return self._confidence[id].clone()
        return torch.from_numpy((self._read(id, CONFIDENCE)[0] / 65535.0).astype(np.float32))

    def holds(self, id: str, *, confidence: bool = False) -> bool:
        """Return whether the mask, and with ``confidence`` its confidence, exists and is not broken.

        Raises:
            DamagedFileError: if a file is whole, but is not the one that the labeler wrote, such as a mask that another
                program saved. The pixels are compared when the mask is read.
        """
        check_store_id(id)
        if self.folder is None:
            return id in self._masks and (not confidence or id in self._confidence)
        names = [(id, ""), (id, CONFIDENCE)] if confidence else [(id, "")]
        return all(holds_png(self._path(*name), origin=self.origin, name="".join(name)) for name in names)

    def missing(self, ids: Sequence[str], *, confidence: bool = False) -> list[str]:
        """Return which ids have no whole mask; which files are opened for that, ``verify`` says.

        Raises:
            DamagedFileError: if masks are whole, but are not those that the labeler wrote; says what to delete.
        """
        step = 1 if self.verify == "all" else max(1, -(-len(ids) // _MOST_VERIFIED))
        missing: list[str] = []
        wrong: list[str] = []
        for number, id in enumerate(ids):
            opened = self.verify != "none" and number % step == 0
            there = self._state(id, confidence) if opened else self._exists(id, confidence)
            if not there:
                (wrong if there is None else missing).append(id)
        if wrong:
            endings = ("", CONFIDENCE) if confidence else ("",)
            raise self._wrong([path for id in wrong for end in endings if (path := self._path(id, end)).exists()])
        return missing

    def claim(self, owner: dict[str, Any], *, images: dict[str, int] | None = None) -> None:
        """Record the labeler that fills this store, so that masks of different labelers are not mixed.

        On disk the record is ``labels.json``.

        Args:
            owner: description of the labeler, JSON-serializable.
            images: checksums of some of the images, by id.

        Raises:
            WorkdirMismatchError: if the store was filled by another labeler, with masks of other images under the same
                ids, or from an unknown origin.
            DamagedFileError: if the record is damaged.
        """
        record = None if self.folder is None else self.folder / "labels.json"
        found = self._owner if record is None else read_record(record)
        if found is None and self._holds_others(seal(owner)):
            where = self.folder or "the store"
            raise WorkdirMismatchError(f"{where} holds masks of unknown origin; use an empty folder")
        if record is None:
            self._owner = merge_claim(found, owner, images, delete="the store", to=_LABEL_ALL)
        else:
            self._owner = claim(record, owner, images=images, to=_LABEL_ALL)
        self._fills = True

    @property
    def origin(self) -> str:
        """Digest of the labeler that fills the store; ``""`` if there is none.

        Raises:
            DamagedFileError: if its record is damaged.
        """
        labeler = self.labeler
        return "" if labeler is None else seal(labeler)

    @property
    def labeler(self) -> dict[str, Any] | None:
        """Settings of the labeler that fills the store, such as ``"num_classes"``; None if there is none.

        Raises:
            DamagedFileError: if its record is damaged.
        """
        if self._owner is None and self.folder is not None:
            self._owner = read_record(self.folder / "labels.json")
        return None if self._owner is None else owner_of(self._owner)

    def expect(self, ids: Sequence[str]) -> None:
        """Prepare the store for masks of these ids: many in one folder are spread over several.

        Raises:
            DataError: if an id cannot name a file in the store, or two cannot be told apart on some system.
        """
        check_store_ids(ids, self.folder)
        folders = Counter(id.rpartition("/")[0] for id in ids)
        self._sharded = self._sharded or max(folders.values(), default=0) > _MOST_IN_FOLDER

    def __getitem__(self, id: str) -> Tensor:
        return self.get(id)

    def __setitem__(self, id: str, mask: Tensor) -> None:
        self.put(id, mask)

    def __contains__(self, id: object) -> bool:
        if not isinstance(id, str) or not is_store_id(id):
            return False
        return id in self._masks if self.folder is None else os.path.exists(self._file(id))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the ids that have a mask: in insertion order in memory, in arbitrary order on disk."""
        if self.folder is None:
            yield from self._masks
            return
        for root, _, files in os.walk(self.folder):
            for name in files:
                if name.endswith(".png") and not name.endswith(f"{CONFIDENCE}.png"):
                    id = (Path(root) / name[: -len(".png")]).relative_to(self.folder).as_posix()
                    yield _SHARD.sub("", id, count=1) if _SHARD.match(id) else id

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"MaskStore({'' if self.folder is None else repr(str(self.folder))})"

    def _path(self, id: str, ending: str = "") -> Path:
        """Return the path of a file: where it is, in a shard or not, else where it belongs."""
        return Path(self._file(id, ending))

    def _file(self, id: str, ending: str = "") -> str:
        """Return what :meth:`_path` does as a text: a ``Path`` interns its parts, a million of them for ever."""
        assert self.folder is not None
        check_store_id(id)
        name, shard = f"{id}{ending}.png", f"shard-{crc32(id.encode()) & 255:02x}"
        files = [os.path.join(self.folder, name), os.path.join(self.folder, shard, name)]
        first, other = files[::-1] if self._sharded else files
        return other if not os.path.exists(first) and os.path.exists(other) else first

    def other_image(self, id: str) -> DamagedFileError:
        """Return the error of a mask that belongs to another image than the one that is there now."""
        return damaged(self._path(id), f"is the mask of another image: {id!r} has changed since then", to=LABEL_AGAIN)

    def _read(self, id: str, ending: str = "") -> tuple[Pixels, int | None]:
        try:
            return read_png(self._path(id, ending), origin=self.origin, name=id + ending)
        except FileNotFoundError:
            raise KeyError(id) from None

    def _holds_others(self, origin: str) -> bool:
        """Return whether there are masks, and the first hundred are of another origin or broken."""
        if self.folder is None:
            return bool(self._masks)
        for id in islice(self, 100):
            with suppress(DataError):
                check_store_id(id)
                if holds_png(self._path(id), origin=origin, name=id):
                    return False
        return next(iter(self), None) is not None

    def _exists(self, id: str, confidence: bool) -> bool:
        if self.folder is None:
            return self.holds(id, confidence=confidence)
        return id in self and (not confidence or os.path.exists(self._file(id, CONFIDENCE)))

    def _state(self, id: str, confidence: bool) -> bool | None:
        """Return what :meth:`holds` does; None if it raises."""
        try:
            return self.holds(id, confidence=confidence)
        except DamagedFileError:
            return None

    def _wrong(self, paths: list[Path]) -> DamagedFileError:
        """Return the error of files that are not those that the labeler wrote."""
        assert self.folder is not None
        delete, again = (paths, LABEL_AGAIN) if len(paths) <= _MOST_NAMED else ([self.folder], _LABEL_ALL)
        what = f"and {len(paths) - 1} more are not" if len(paths) > 1 else "is not"
        return damaged(paths[0], f"{what} what this labeling wrote", delete=delete, to=again)


def _check_confidence(confidence: Tensor, mask: Tensor, id: str) -> None:
    if confidence.shape != mask.shape:
        raise DataError(f"confidence of {id!r} has shape {tuple(confidence.shape)}; expected {tuple(mask.shape)}")
    low, high = (float(v) for v in torch.aminmax(confidence))
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also catches NaN
        raise DataError(f"confidence of {id!r} holds values from {low:g} to {high:g}; expected [0, 1]")


def _pixels_of(mask: Tensor, id: str) -> Pixels:
    if mask.dtype == torch.uint8:
        return mask.numpy()
    low, high = (int(v) for v in torch.aminmax(mask))
    if low < 0 or high > 65535:
        raise DataError(
            f"mask of {id!r} holds values from {low} to {high}; expected 0..65535 for a PNG "
            "(choose another ignore_index)"
        )
    return mask.numpy().astype(np.uint16)
