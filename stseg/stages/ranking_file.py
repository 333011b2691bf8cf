"""Ranking of a run on disk: ``ranking.csv``, and its origin and digest beside it in ``ranking.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stseg.errors import DataError
from stseg.inference.ranking import Ranking
from stseg.storage.records import as_json, owner_of, read_record, refuse_other, write_record
from stseg.storage.seals import damaged, seal

_AGAIN = "rank the images again"


def read_ranking(path: Path, owner: dict[str, Any]) -> Ranking | None:
    """Return the ranking in a file; None if there is none.

    Args:
        path: the CSV file.
        owner: the networks and images that were ranked, JSON-serializable.

    Raises:
        DamagedFileError: if a file is damaged, or is not the one that :func:`write_ranking` wrote.
        WorkdirMismatchError: if the owner differs.
    """
    if not path.exists():
        return None
    found = _read_origin(path)
    refuse_other(owner_of(found), owner, path.parent, to=_AGAIN)
    return _read(path, found)


def read_any_ranking(path: Path) -> Ranking:
    """Return the ranking in a file, whatever was ranked.

    Raises:
        DamagedFileError: if a file is damaged, or is not the one that :func:`write_ranking` wrote.
    """
    return _read(path, _read_origin(path))


def _read_origin(path: Path) -> dict[str, Any]:
    record = path.with_suffix(".json")
    found = read_record(record, delete=[record, path], to=_AGAIN)
    if found is None:
        raise damaged(path, f"is of unknown origin, as there is no {record.name} beside it", to=_AGAIN)
    return found


def _read(path: Path, found: dict[str, Any]) -> Ranking:
    try:
        content = path.read_bytes()
        if found.get("result") == seal(content):
            return Ranking.from_csv(path, limits=None)
    except (OSError, DataError):
        pass
    raise damaged(path, "is damaged, or is not the ranking of this run", to=_AGAIN)


def write_ranking(path: Path, owner: dict[str, Any], ranking: Ranking) -> None:
    """Write a ranking, after the record of its origin and digest."""
    content = ranking.as_csv()
    write_record(path.with_suffix(".json"), {**as_json(owner), "result": seal(content)})
    ranking.to_csv(path)
