"""Scores appended to disk, so that a killed ranking resumes."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stseg.distributed import barrier, rank
from stseg.errors import DataError, WorkdirMismatchError
from stseg.storage.records import claim


class ScoreLog:
    """Log of scores, one per line; each process appends to its own file.

    The origin of the scores is recorded next to it, in a file that ends in ``.json``.

    Args:
        path: file of the first process; process ``n`` uses the same name with ``.n`` appended.
        owner: origin of the scores, JSON-serializable.
        images: checksums of some of the images, by id.

    Raises:
        WorkdirMismatchError: if the scores have another owner, are those of other images, or are of unknown origin.
    """

    def __init__(self, path: Path, owner: dict[str, Any], images: dict[str, int]) -> None:
        self.path = path
        self.mine = path if rank() == 0 else path.with_name(f"{path.name}.{rank()}")
        record = path.with_name(f"{path.name}.json")
        used = bool(self._files())
        barrier()
        if not used and rank() == 0:
            record.unlink(missing_ok=True)  # its scores have been deleted
        if used and not record.exists():
            raise WorkdirMismatchError(
                f"{path} is of unknown origin, as there is no {record.name} beside it; "
                "delete it to recompute the ranking"
            )
        claim(record, owner, images=images, where=path)

    def read(self, ids: Sequence[str]) -> dict[int, float]:
        """Return the scores in all files, by position in ``ids``.

        Raises:
            DataError: if a file is damaged; an incomplete last line is dropped.
        """
        index_of = {id: index for index, id in enumerate(ids)}
        scores: dict[int, float] = {}
        for path in self._files():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if path == self.mine and whole != content:  # the process was killed while writing a line
                os.truncate(path, len(whole))
            try:
                known = [(str(id), float(score)) for id, score in map(json.loads, whole.splitlines())]
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path} holds a line that is no score ({error}); delete it to recompute the ranking"
                ) from None
            for id, score in known:
                if not 0 <= score <= 1:
                    raise DataError(
                        f"{path} gives {id!r} the score {score}, not in [0, 1]; delete it to recompute the ranking"
                    )
            scores.update((index_of[id], score) for id, score in known if id in index_of)
        return scores

    def add(self, id: str, score: float) -> None:
        """Append a score to the file of this process."""
        self.mine.parent.mkdir(parents=True, exist_ok=True)
        with open(self.mine, "ab") as file:
            file.write(json.dumps([id, score]).encode() + b"\n")

    def _files(self) -> list[Path]:
        beside = self.path.parent.glob(glob.escape(self.path.name) + ".*")
        numbered = sorted(p for p in beside if p.name[len(self.path.name) + 1 :].isdecimal())
        return [path for path in (self.path, *numbered) if path.exists()]
