"""Work directory of a run: its settings, its data and its finished steps."""

from __future__ import annotations

import os
import platform
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stseg.distributed import all_gather, barrier, rank
from stseg.errors import WorkdirInUseError, WorkdirMismatchError
from stseg.storage.files import absolute_folder, lock
from stseg.storage.records import read_record, refuse_other, write_record

_START_OVER = "start over"


class Workdir:
    """Work directory of a run: ``run.json`` and a folder for each step.

    Args:
        folder: created on the first write; None keeps nothing on disk.
        settings: settings of the run, JSON-serializable.

    Raises:
        WorkdirMismatchError: if the folder was made with other settings.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        self.folder = absolute_folder(folder)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"the work directory {self.folder} is a file; expected a folder")
        if self.folder is not None and (self.folder / "stage.json").exists():
            raise WorkdirMismatchError(f"{self.folder} holds a training of stseg.fit; use another folder")
        self._run: dict[str, Any] = {"settings": settings, "versions": _versions(), "data": {}, "steps": {}}
        if self.folder is not None and (found := read_record(self.folder / "run.json")) is not None:
            refuse_other(found["settings"], settings, self.folder, to=_START_OVER)
            self._run = found

    def claim(self, data: dict[str, Any]) -> None:
        """Record the validated data of the run, and lock the folder against other processes.

        Raises:
            WorkdirMismatchError: if the folder was made with other data.
            WorkdirInUseError: if another process is using it.
        """
        if self.folder is not None and self._run["data"]:
            refuse_other(self._run["data"], data, self.folder, to=_START_OVER)
        self._keep_others_out()
        self._run["data"] = data
        self._write()

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

    def _keep_others_out(self) -> None:
        """Lock the folder until this object is garbage-collected."""
        descriptor = None
        if self.folder is not None and rank() == 0:
            descriptor = lock(self.folder / ".lock")
            if descriptor is not None:
                weakref.finalize(self, os.close, descriptor)
        if self.folder is not None and all_gather(descriptor is not None)[0] is False:
            raise WorkdirInUseError(f"{self.folder} is in use by another process; expected one run in it at a time")

    def _write(self) -> None:
        if self.folder is not None and rank() == 0:
            write_record(self.folder / "run.json", self._run)
        barrier()


def _versions() -> dict[str, str]:
    names = ("stseg", "torch", "torchvision", "segmentation-models-pytorch", "timm", "kornia", "accelerate")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
