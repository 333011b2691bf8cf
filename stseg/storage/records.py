"""Provenance: records of the settings and data that results were made from, checked before results are reused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stseg.distributed import barrier, rank
from stseg.errors import WorkdirMismatchError
from stseg.storage.files import misplaced, write_atomically
from stseg.storage.seals import damaged, seal

_SEAL = "seal"  # key of a record's own digest
_BESIDE = ("images", "result")  # keys of a record that are not part of the owner


def claim(
    path: Path,
    owner: dict[str, Any],
    *,
    images: dict[str, int] | None = None,
    delete: object = None,
    to: str,
    where: object = None,
) -> dict[str, Any]:
    """Record the owner of results, or compare it with an existing record.

    Args:
        path: the record, a JSON file.
        owner: settings and data, JSON-serializable.
        images: checksums of some of the images, by id; merged over several claims.
        delete: what messages say to delete if the owner differs; by default the folder of the record.
        to: what the same call does after that, such as "start over".
        where: whose owner it is, in messages; by default what to delete.

    Returns:
        The record: the owner, ``"images"``, and ``"result"`` if :func:`write_record` added one.

    Raises:
        WorkdirMismatchError: if the owner differs, or images with the same id differ; names the difference.
        DamagedFileError: if the record is damaged.
    """
    found = read_record(path)
    record = merge_claim(found, owner, images, delete=delete or path.parent, to=to, where=where)
    barrier()
    if record != found and rank() == 0:
        write_record(path, record)
    return record


def merge_claim(
    found: dict[str, Any] | None,
    owner: dict[str, Any],
    images: dict[str, int] | None,
    *,
    delete: object,
    to: str,
    where: object = None,
) -> dict[str, Any]:
    """Merge the record of an owner with an existing one after comparing them; see :func:`claim`."""
    record = as_json(owner)
    known = {} if found is None else found.get("images", {})
    if found is not None:
        refuse_other(owner_of(found), record, delete, to=to, where=where)
    for id, checksum in (images or {}).items():
        if known.get(id, checksum) != checksum:
            raise WorkdirMismatchError(
                f"{where or delete} holds results of other images: the one called {id!r} differs. "
                f"Use another folder, or delete {delete} to {to}"
            )
    if known or images:
        record["images"] = {**known, **(images or {})}
    if found is not None and "result" in found:
        record["result"] = found["result"]
    return record


def owner_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the owner in a record."""
    return {key: value for key, value in record.items() if key not in _BESIDE}


def read_record(path: Path, *, delete: Sequence[Path] = (), to: str = "write it again") -> dict[str, Any] | None:
    """Return the record in a file; None if there is no file.

    Raises:
        DamagedFileError: if the file is not a record that :func:`write_record` wrote; the message says what to
            ``delete`` (by default the file) and what the same call then does (``to``).
    """
    again = partial(damaged, path, delete=delete, to=to)
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise again("is a folder; expected a file", delete=[path]) from None
    except NotADirectoryError as error:
        raise misplaced(path) or error from None
    except (ValueError, RecursionError) as error:
        raise again(f"is damaged: it is not JSON ({error})") from None
    if not isinstance(record, dict) or record.pop(_SEAL, None) != _digest(path, record):
        raise again("is damaged, or was exchanged or changed by hand: its digest differs")
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace the record in a file, with a digest of it."""
    content = json.dumps({**record, _SEAL: _digest(path, as_json(record))}, indent=1, allow_nan=False).encode()
    write_atomically(path, lambda file: file.write(content))


def as_json(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record as it is read from a file."""
    read: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return read


def refuse_other(found: dict[str, Any], now: dict[str, Any], delete: object, *, to: str, where: object = None) -> None:
    """Raise a ``WorkdirMismatchError`` that names the differences if there are any; see :func:`claim`."""
    if differences := diff(found, as_json(now)):
        raise WorkdirMismatchError(
            f"{where or delete} was made with other settings or data: {'; '.join(differences)}. "
            f"Use another folder, or delete {delete} to {to}"
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
    if found == now:
        return []
    hint = f' (precision="{found}" goes on with it)' if name.endswith("precision") and found else ""
    return [f"{name} is {found!r} there and {now!r} now{hint}"]


def _digest(path: Path, record: dict[str, Any]) -> str:
    try:
        return seal(path.name, record)
    except (ValueError, RecursionError):  # NaN or lone surrogates that a damaged file may hold
        return ""
