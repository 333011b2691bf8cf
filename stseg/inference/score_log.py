"""Scores appended to disk, so that a killed ranking resumes."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stseg.distributed import barrier, rank
from stseg.errors import WorkdirMismatchError
from stseg.storage.files import misplaced
from stseg.storage.folder_lock import check_folders
from stseg.storage.records import as_json, claim
from stseg.storage.seals import damaged, seal

_AGAIN = "score its images again"


class ScoreLog:
    """Log of scores, one per line, each with a digest; each process appends to its own file.

    The origin of the scores is recorded next to it, in a file that ends in ``.json``.

    Args:
        path: file of the first process; process ``n`` uses the same name with ``.n`` appended.
        owner: origin of the scores, JSON-serializable.
        images: checksums of some of the images, by id.

    Raises:
        WorkdirMismatchError: if the scores have another owner, are those of other images, or are of unknown origin.
        DamagedFileError: if the record of their origin is damaged.
    """

    def __init__(self, path: Path, owner: dict[str, Any], images: dict[str, int]) -> None:
        self.path = path
        self.mine = path if rank() == 0 else path.with_name(f"{path.name}.{rank()}")
        record = path.with_name(f"{path.name}.json")
        files = self._files()
        barrier()
        if not files and rank() == 0 and record.is_file():
            record.unlink()  # its scores have been deleted
        barrier()
        self._owner = seal(as_json(owner))
        if not record.exists() and not all(map(self._begins, files)):
            raise WorkdirMismatchError(
                f"{path} is of unknown origin, as there is no {record.name} beside it; use another file"
            )
        barrier()
        claim(record, owner, images=images, delete=" and ".join(map(str, files)), to="rank again")

    def read(self, ids: Sequence[str]) -> dict[int, float]:
        """Return the scores in all files, by position in ``ids``.

        Raises:
            DamagedFileError: if a line is damaged, or was written by another ranking; an incomplete last line is
                dropped.
        """
        index_of = {id: index for index, id in enumerate(ids)}
        scores: dict[int, float] = {}
        for path in self._files():
            try:
                content = path.read_bytes()
            except IsADirectoryError:
                raise damaged(path, "is a folder; expected a file", to=_AGAIN) from None
            whole = content[: content.rfind(b"\n") + 1]
            if path == self.mine and whole != content:  # the process was killed while writing a line
                os.truncate(path, len(whole))
            try:
                known = [(id, score, digest) for id, score, digest in map(json.loads, whole.split(b"\n")[:-1])]
                wrong = [number for number, (*line, digest) in enumerate(known, 1) if digest != self._seal(*line)]
            except (ValueError, TypeError, RecursionError) as error:
                raise damaged(path, f"holds a line that is no score ({error})", to=_AGAIN) from None
            if wrong:
                raise damaged(path, f"is damaged, or is that of another ranking: line {wrong[0]} differs", to=_AGAIN)
            scores.update((index_of[id], score) for id, score, _ in known if id in index_of)
        return scores

    def add(self, id: str, score: float) -> None:
        """Append a score to the file of this process."""
        check_folders(self.mine)
        self.mine.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(self.mine, "ab") as file:
                file.write(json.dumps([id, score, self._seal(id, score)]).encode() + b"\n")
        except OSError as error:
            raise misplaced(self.mine) or OSError(error.errno, error.strerror, str(self.mine)) from None

    def _begins(self, path: Path) -> bool:
        """Return whether a file begins with a line of this ranking."""
        try:
            with open(path, "rb") as file:
                *line, digest = json.loads(file.readline())
            return bool(digest == self._seal(*line))
        except (OSError, ValueError, TypeError, RecursionError):
            return False

    def _seal(self, id: object, score: object) -> str:
        return seal(self._owner, id, score)[:16]

    def _files(self) -> list[Path]:
        beside = self.path.parent.glob(glob.escape(self.path.name) + ".*")
        numbered = sorted(p for p in beside if p.name[len(self.path.name) + 1 :].isdecimal())
        return [path for path in (self.path, *numbered) if path.exists()]
