"""Provenance: records of the settings and data that results were made from, checked before results are reused."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import zlib
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

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
    content = json.dumps(record, indent=1).encode()
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


def describe(value: Any) -> Any:
    """Describe a setting, a function or an object by JSON-serializable values, the same in every run.

    An object can define its own description by a method ``provenance()``. A lambda is described by its source if
    available.

    Example:
        >>> describe(nn.ReLU()), describe(len), describe(functools.partial(round, ndigits=2))
        ('ReLU()', 'builtins.len', {'partial': 'builtins.round', 'args': [], 'keywords': {'ndigits': 2}})
    """
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [describe(each) for each in value]
    if isinstance(value, dict):
        return {str(key): describe(each) for key, each in value.items()}
    if callable(provenance := getattr(value, "provenance", None)) and not isinstance(value, type):
        return {"type": type(value).__qualname__, **provenance()}
    if isinstance(value, functools.partial):
        return {
            "partial": describe(value.func),
            "args": describe(value.args),
            "keywords": describe(value.keywords),
        }
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        settings = {each.name: describe(getattr(value, each.name)) for each in dataclasses.fields(value)}
        return {"type": type(value).__qualname__, **settings}
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)} {_checksum([value])}"
    if isinstance(value, nn.Module):
        return _describe_module(value)
    if _has_no_repr(value):
        return _describe_attributes(value)
    if not hasattr(value, "__qualname__"):
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return _describe_function(value)


def _describe_module(module: nn.Module) -> str:
    """Return the ``repr`` and a checksum of the buffers, such as class weights of a loss, which it does not show."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module))
    tensors = list(module.buffers())
    return f"{text} {_checksum(tensors)}" if tensors else text


def _checksum(tensors: list[Tensor]) -> str:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(str(tuple(tensor.shape)).encode(), total)
        total = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), total)
    return f"{total:08x}"


def _has_no_repr(value: object) -> bool:
    return getattr(type(value), "__repr__", None) is object.__repr__


def _describe_attributes(value: object) -> dict[str, Any]:
    """Return type and attributes of an object that has no ``repr``; for attributes without one, the type only."""
    attributes = {
        name: type(each).__qualname__ if _has_no_repr(each) else describe(each)
        for name, each in getattr(value, "__dict__", {}).items()
    }
    return {"type": type(value).__qualname__, **attributes}


def _describe_function(function: Any) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    code = getattr(function, "__code__", None)
    if code is None:
        return name
    bound = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *_closure(function)]
    plain = [each for each in bound if isinstance(each, (bool, int, float, str, tuple, type(None)))]
    parts = [name, str(plain) if plain else "", _lambda_source(function, code) if "<lambda>" in name else ""]
    return " ".join(part for part in parts if part)


def _closure(function: Any) -> list[Any]:
    cells = function.__closure__ or ()
    return [cell.cell_contents for cell in cells if cell != type(cell)()]  # skip empty cells


def _lambda_source(function: Any, code: CodeType) -> str:
    """Return the source of a lambda expression; empty if it cannot be found."""
    try:
        lines, _ = inspect.findsource(function)
        tree = ast.parse("".join(lines))
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno and _arguments(node) == _names(code)
    ]
    # Several on one line: from Python 3.11 on, instructions have column positions.
    places = [(line, column) for line, _, column, _ in getattr(code, "co_positions", tuple)() if line and column]
    inner = [node for node in found if any(_holds(node.body, place) for place in places)]
    return "; ".join(ast.unparse(node) for node in (inner[-1:] or found))


def _arguments(node: ast.Lambda) -> list[str]:
    a = node.args
    several = [each.arg for each in (a.vararg, a.kwarg) if each is not None]
    return [each.arg for each in (*a.posonlyargs, *a.args, *a.kwonlyargs)] + several


def _names(code: CodeType) -> list[str]:
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return list(code.co_varnames[:count])


def _holds(body: ast.expr, place: tuple[int, int]) -> bool:
    end = (body.end_lineno or body.lineno, body.end_col_offset or 0)
    return (body.lineno, body.col_offset) <= place < end
