"""Provenance: records of the settings and data that results were made from, checked before results are reused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stseg.distributed import barrier, rank
from stseg.errors import WorkdirMismatchError
from stseg.storage.files import write_atomically

_BESIDE = ("images", "result")  # keys of a record that are not part of the owner


def claim(
    path: Path, owner: dict[str, Any], *, images: dict[str, int] | None = None, where: Path | None = None
) -> dict[str, Any]:
    """Record the owner of results, or compare it with an existing record.

    Args:
        path: the record, a JSON file.
        owner: settings and data, JSON-serializable.
        images: checksums of some of the images, by id; merged over several claims.
        where: path that messages say to delete; by default the folder of the record.

    Returns:
        The record: the owner, ``"images"``, and ``"result"`` if :func:`write_record` added one.

    Raises:
        WorkdirMismatchError: if the owner differs, or images with the same id differ; names the difference.
    """
    found = read_record(path)
    record = merge_claim(found, owner, images, where=where or path.parent)
    barrier()
    if record != found and rank() == 0:
        write_record(path, record)
    return record


def merge_claim(
    found: dict[str, Any] | None, owner: dict[str, Any], images: dict[str, int] | None, *, where: object
) -> dict[str, Any]:
    """Merge the record of an owner with an existing one after comparing them; see :func:`claim`."""
    record: dict[str, Any] = json.loads(json.dumps(owner))
    known = {} if found is None else found.get("images", {})
    if found is not None:
        refuse_other({key: value for key, value in found.items() if key not in _BESIDE}, record, where)
    for id, checksum in (images or {}).items():
        if known.get(id, checksum) != checksum:
            raise WorkdirMismatchError(f"{where} holds results of other images: the one called {id!r} differs")
    if known or images:
        record["images"] = {**known, **(images or {})}
    if found is not None and "result" in found:
        record["result"] = found["result"]
    return record


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record in a file; None if there is no file.

    Raises:
        WorkdirMismatchError: if the file is not a record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkdirMismatchError(f"{path} is not JSON ({error}); delete {path.parent} to start over") from None
    if not isinstance(record, dict):
        raise WorkdirMismatchError(f"{path} holds no record; delete {path.parent} to start over")
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace the record in a file."""
    content = json.dumps(record, indent=1, allow_nan=False).encode()
    write_atomically(path, lambda file: file.write(content))


def refuse_other(found: dict[str, Any], now: dict[str, Any], where: object) -> None:
    """Raise a ``WorkdirMismatchError`` that names the differences if there are any."""
    now = json.loads(json.dumps(now))
    if differences := diff(found, now):
        raise WorkdirMismatchError(
            f"{where} was made with other settings or data: {'; '.join(differences)}. "
            "Use another folder, or delete it to start over"
        )


def diff(found: Any, now: Any, name: str = "") -> list[str]:
    """Describe the differences between two records, each in words.

    Example:
        >>> diff({"config": {"lr": 0.1, "seed": 0}}, {"config": {"lr": 0.2, "seed": 0}})
        ['config.lr is 0.1 there and 0.2 now']
    """
    if isinstance(found, dict) and isinstance(now, dict):
        return [
            text
            for key in {**found, **now}
            for text in diff(found.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    return [] if found == now else [f"{name} is {found!r} there and {now!r} now"]
