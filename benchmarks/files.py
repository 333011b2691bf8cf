"""Atomic writes of result files, and records of the settings of a folder."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import stseg


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step: a process killed at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.part"
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Replace a JSON file in one step."""
    write(path, json.dumps(record, indent=1).encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the record in a JSON file; None if there is no file."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def claim(path: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a folder, or compare them with an existing record.

    Raises:
        WorkdirMismatchError: if they differ; names the differences.
    """
    found, settings = read_json(path), json.loads(json.dumps(settings))
    if found is None:
        write_json(path, settings)
        return
    names = [name for name in {**found, **settings} if found.get(name) != settings.get(name)]
    if names:
        differences = "; ".join(f"{n} is {found.get(n)!r} there and {settings.get(n)!r} now" for n in names)
        raise stseg.WorkdirMismatchError(
            f"{path.parent} was made with other settings or data: {differences}. Use another folder, or remove it"
        )


@contextmanager
def taken(path: Path) -> Iterator[bool]:
    """Take a lock file for the block; yields whether it was free. A killed process gives it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
