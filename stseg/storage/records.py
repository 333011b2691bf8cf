"""Provenance: what a folder or a file was made from, recorded beside it so that other settings or data are refused."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from stseg.distributed import barrier, rank
from stseg.errors import WorkdirMismatchError
from stseg.storage.files import write_atomically

_BESIDE = ("images", "result")  # what a record holds beside its owner


def claim(
    path: Path, owner: dict[str, Any], *, images: dict[str, int] | None = None, where: Path | None = None
) -> dict[str, Any]:
    """Record who makes what lies beside a file, or compare with the record that is there.

    Args:
        path: the record, a JSON file.
        owner: settings and data, of JSON's types.
        images: checksums of some of the images, by id; those of several claims are collected.
        where: what messages say to delete; by default the folder of the record.

    Returns:
        The record: the owner, ``"images"``, and ``"result"`` if :func:`write_record` added one.

    Raises:
        WorkdirMismatchError: if the owner is another one, or images of the same id differ; names the difference.
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
    """Return the record of an owner, compared with the one that was found; see :func:`claim`."""
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
    """Raise a ``WorkdirMismatchError`` that names the differences, if there are any."""
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
    """Describe a setting, a function or an object by JSON's types, the same in every run.

    An object may describe itself by a method ``provenance()``. A lambda is described by its source, where that can be
    found.

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
    if getattr(type(value), "__repr__", None) is object.__repr__:
        return {"type": type(value).__qualname__, **describe(vars(value))} if hasattr(value, "__dict__") else {}
    if isinstance(value, nn.Module) or not hasattr(value, "__qualname__"):
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return _describe_function(value)


def _describe_function(function: Callable[..., Any]) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    if not hasattr(function, "__code__"):
        return name
    bound = [*(function.__defaults__ or ()), *(cell.cell_contents for cell in function.__closure__ or ())]
    plain = [each for each in bound if isinstance(each, (bool, int, float, str, tuple, type(None)))]
    if plain:
        name += f" {plain}"
    return f"{name} {_source_of_lambda(function)}".rstrip() if "<lambda>" in name else name


def _source_of_lambda(function: Callable[..., Any]) -> str:
    """The expression alone, not the lines around it; of several in one statement those with the same arguments."""
    try:
        statement = textwrap.dedent(inspect.getsource(function)).strip().rstrip(",")
        try:
            tree = ast.parse(statement)
        except SyntaxError:  # a part of a call that goes over several lines
            tree = ast.parse(f"f({statement})")
    except (OSError, TypeError, SyntaxError):
        return ""
    arguments = list(inspect.signature(function).parameters)
    lambdas = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Lambda)
        and [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)] == arguments
    ]
    return "; ".join(ast.unparse(node) for node in lambdas)
