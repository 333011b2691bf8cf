"""Scores on disk as they come, so that a ranking that was killed goes on."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stseg.distributed import rank
from stseg.errors import DataError, WorkdirMismatchError


class ScoreLog:
    """Scores appended to a file, one a line; of several processes each has a file of its own.

    Args:
        path: file of the first process; that of process ``n`` is beside it, with ``.n`` behind its name.
        description: whose scores they are, of JSON's types.
        images: check sums of some of the images, by id.
    """

    def __init__(self, path: Path, description: dict[str, Any], images: dict[str, int]) -> None:
        self.path = path
        self.header = {"of": description, "images": images}
        self.mine = path if rank() == 0 else path.with_name(f"{path.name}.{rank()}")

    def read(self, ids: Sequence[str]) -> dict[int, float]:
        """The scores in all files, by position in ``ids``.

        Raises:
            WorkdirMismatchError: if a file has another description.
            DataError: if a file is damaged; a last line cut short is only dropped.
        """
        index_of = {id: index for index, id in enumerate(ids)}
        beside = self.path.parent.glob(glob.escape(self.path.name) + ".*")
        scores: dict[int, float] = {}
        for path in [self.path, *sorted(p for p in beside if p.name[len(self.path.name) + 1 :].isdecimal())]:
            content = path.read_bytes() if path.exists() else b""
            if b"\n" in content or not b'{"of":'.startswith(content[:6]):  # else a header cut short, or nothing
                self._check_header(path, content.split(b"\n")[0])
            whole = content[: content.rfind(b"\n") + 1]
            if path == self.mine and whole != content:  # the process was killed while it wrote a line
                os.truncate(path, len(whole))
            try:
                known = [(str(id), float(score)) for id, score in map(json.loads, whole.splitlines()[1:])]
            except (ValueError, TypeError) as error:
                raise DataError(f"{path} holds a line that is no score ({error}); remove it to rank anew") from None
            for id, score in known:
                if not 0 <= score <= 1:
                    raise DataError(f"{path} gives {id!r} the score {score}, not in [0, 1]; remove it to rank anew")
            scores.update((index_of[id], score) for id, score in known if id in index_of)
        return scores

    def _check_header(self, path: Path, line: bytes) -> None:
        try:
            found = json.loads(line)
            same = found["of"] == self.header["of"]
            others = [id for id, crc in self.header["images"].items() if found["images"].get(id, crc) != crc]
        except (ValueError, TypeError, KeyError, AttributeError):
            same, others = False, []
        if not same:
            raise WorkdirMismatchError(f"{path} holds scores of other checkpoints or settings; remove it to rank anew")
        if others:
            raise WorkdirMismatchError(f"{path} holds scores of other images: the one called {others[0]!r} differs")

    def add(self, id: str, score: float) -> None:
        """Append a score to the file of this process."""
        self.mine.parent.mkdir(parents=True, exist_ok=True)
        with open(self.mine, "ab") as file:
            lines = [[id, score]] if file.tell() else [self.header, [id, score]]
            file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
