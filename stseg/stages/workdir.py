"""Work directory of a run: its settings, its data and its finished steps."""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stseg.distributed import barrier, rank
from stseg.errors import WorkdirMismatchError
from stseg.storage.files import absolute_folder, remove_leftovers
from stseg.storage.folder_lock import hold_folder
from stseg.storage.records import as_json, read_record, refuse_other, write_record
from stseg.storage.seals import what_to_delete

PREDICTIONS = "predictions.json"
"""Pictures of predictions for the report."""

_START_OVER = "start over"
_MARKERS = ("stage.json", "masks", "thresholds.json", "ranking.csv", "scores")  # one is in the folder of each step


class Workdir:
    """Work directory of a run: ``run.json`` and a folder for each step. It is locked until the context is left.

    Nothing is written into a folder in which all is done already.

    Args:
        folder: created by :meth:`claim`; None keeps nothing on disk.
        settings: settings of the run, JSON-serializable.
        class_names: names of the classes for reports, kept while the run is under way; they may change.

    Raises:
        WorkdirMismatchError: if the folder was made with other settings.
        DamagedFileError: if its record is damaged.
    """

    def __init__(
        self, folder: str | Path | None, settings: dict[str, Any], *, class_names: Sequence[str] | None = None
    ) -> None:
        self.folder = absolute_folder(folder)
        if self.folder is not None and (self.folder / "stage.json").exists():
            raise WorkdirMismatchError(f"{self.folder} holds a training of stseg.fit; use another folder")
        self._run: dict[str, Any] = {"settings": settings, "versions": _versions(), "data": {}, "steps": {}}
        self._class_names = class_names
        self._held = ExitStack()
        self._read()

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def claim(self, data: dict[str, Any]) -> None:
        """Record the validated data of the run, and lock the folder against other runs.

        Raises:
            WorkdirMismatchError: if the folder was made with other settings or data.
            WorkdirInUseError: if another run is using it.
        """
        self._refuse_other_data(data)
        self._held.enter_context(hold_folder(self.folder))
        self._read()  # another run may have written it meanwhile
        self._refuse_other_data(data)
        if self.folder is not None and rank() == 0:
            remove_leftovers(self.folder)
        barrier()
        self._run["data"] = as_json(data)
        if self._class_names is not None and not self.is_finished:
            self._run["class names"] = list(self._class_names)
        self._write()

    @property
    def is_finished(self) -> bool:
        """Whether all was done before, report included, and nothing has been written."""
        return self.folder is not None and not self._changed and (self.folder / "report.html").is_file()

    def path(self, *parts: str) -> Path | None:
        """Return a path in the folder; None without a folder."""
        return None if self.folder is None else self.folder.joinpath(*parts)

    def facts(self, step: str) -> dict[str, Any] | None:
        """Return the facts recorded for a finished step; None if it is not finished."""
        facts: dict[str, Any] | None = self._run["steps"].get(step)
        return facts

    def done(self, step: str, **facts: Any) -> None:
        """Record that a step is finished."""
        if step not in self._run["steps"]:
            self._run["steps"][step] = facts
            self._write()

    def finish(self) -> None:
        """Record when all steps of the run were finished."""
        self._run.setdefault("finished", datetime.now(timezone.utc).isoformat(timespec="seconds"))
        self._write()

    def _read(self) -> None:
        found = None if self.folder is None else read_record(self.folder / "run.json")
        if found is not None:
            refuse_other(found["settings"], self._run["settings"], self._all(), to=_START_OVER, where=self.folder)
            self._run = found
        self._written, self._changed = copy.deepcopy(found), False

    def _all(self) -> str:
        """Name all that belongs to the run."""
        assert self.folder is not None
        steps = {path.parent.name for marker in _MARKERS for path in self.folder.glob(f"*/{marker}")}
        return what_to_delete(self.folder, {"run.json", "report.html", PREDICTIONS, *steps})

    def _refuse_other_data(self, data: dict[str, Any]) -> None:
        if self.folder is not None and self._run["data"]:
            refuse_other(self._run["data"], data, self._all(), to=_START_OVER, where=self.folder)

    def _write(self) -> None:
        if self._run != self._written:
            self._written, self._changed = copy.deepcopy(self._run), True
            if self.folder is not None and rank() == 0:
                write_record(self.folder / "run.json", self._run)
        barrier()


def _versions() -> dict[str, str]:
    names = ("stseg", "torch", "torchvision", "segmentation-models-pytorch", "timm", "kornia", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
