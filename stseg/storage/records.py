"""What a folder was made with, written beside its results so that other settings or data are refused."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

from torch import nn

from stseg.distributed import barrier, rank
from stseg.errors import WorkdirMismatchError
from stseg.storage.files import write_atomically


def claim(path: Path, record: dict[str, Any]) -> None:
    """Write a record where there is none; compare with the one that is there.

    Raises:
        WorkdirMismatchError: if the two differ; names what is there and what came.
    """
    found = read_record(path)
    if found is not None:
        refuse_other(found, record, path.parent)
    barrier()
    if found is None and rank() == 0:
        write_record(path, record)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a file; None if there is no file.

    Raises:
        WorkdirMismatchError: if the file is no record.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise WorkdirMismatchError(f"{path} is not JSON ({error}); remove {path.parent} to begin anew") from None
    if not isinstance(record, dict):
        raise WorkdirMismatchError(f"{path} holds no record; remove {path.parent} to begin anew")
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace the record in a file."""
    content = json.dumps(record, indent=1).encode()
    write_atomically(path, lambda file: file.write(content))


def refuse_other(found: dict[str, Any], now: dict[str, Any], folder: object) -> None:
    """Raise a ``WorkdirMismatchError`` that names the differences, if there are any."""
    now = json.loads(json.dumps(now))
    if differences := diff(found, now):
        raise WorkdirMismatchError(
            f"{folder} was made with other settings or data: {'; '.join(differences)}. "
            "Use another folder, or remove it to begin anew"
        )


def diff(found: Any, now: Any, name: str = "") -> list[str]:
    """The differences between two records, each in words.

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


def describe(value: Any) -> str:
    """A callable or an object in words that are the same in every run.

    Example:
        >>> describe(nn.ReLU()), describe(len)
        ('ReLU()', 'builtins.len')
    """
    if isinstance(value, nn.Module) or not hasattr(value, "__qualname__"):
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    name = f"{value.__module__}.{value.__qualname__}"
    code = getattr(value, "__code__", None)
    if code is None:
        return name
    bound = [*(value.__defaults__ or ()), *(cell.cell_contents for cell in value.__closure__ or ())]
    plain = [each for each in bound if isinstance(each, (bool, int, float, str, tuple, type(None)))]
    if plain:
        name += f" {plain}"
    if "<lambda>" in name:  # all of a module have one name
        constants = [sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c) for c in code.co_consts]
        own = [constant for constant in constants if " at 0x" not in constant]
        name += f" {zlib.crc32(repr((code.co_code, code.co_names, own)).encode()):08x}"
    return name
