"""Descriptions of settings, functions and objects by values that a record can hold."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import os
import re
import sysconfig
import textwrap
import zlib
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

_LIBRARIES = tuple(
    str(Path(folder).resolve()) + os.sep
    for folder in (*map(sysconfig.get_path, ("stdlib", "platlib", "purelib")), str(Path(__file__).parent))
)
"""Folders of functions that change with versions, which are recorded by themselves."""


def describe(value: Any) -> Any:
    """Describe a setting, a function or an object by JSON-serializable values, the same in every run.

    An object can define its own description by a method ``provenance()``. A lambda is described by its source if
    available.

    Example:
        >>> describe(nn.ReLU()), describe(len), describe(functools.partial(round, ndigits=2))
        ('ReLU()', 'builtins.len', {'partial': 'builtins.round', 'args': [], 'keywords': {'ndigits': 2}})
    """
    if isinstance(value, float) and not math.isfinite(value):  # which JSON lacks
        return str(value)
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
        return _describe_attributes(value, ())
    if not hasattr(value, "__qualname__"):
        return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))
    return _describe_function(value)


def _describe_module(module: nn.Module, *, weights: bool = False) -> str:
    """Return the ``repr`` and a checksum of the buffers, such as class weights of a loss, which it does not show."""
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module))
    tensors = [*module.buffers(), *(module.parameters() if weights else ())]
    return f"{text} {_checksum(tensors)}" if tensors else text


def _checksum(tensors: list[Tensor]) -> str:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(str(tuple(tensor.shape)).encode(), total)
        total = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), total)
    return f"{total:08x}"


def _has_no_repr(value: object) -> bool:
    return getattr(type(value), "__repr__", None) is object.__repr__


def _describe_attributes(value: object, outer: tuple[object, ...]) -> dict[str, Any]:
    """Return type and attributes of an object that has no ``repr``, networks with their weights."""

    def described(each: object) -> Any:
        if isinstance(each, nn.Module):
            return _describe_module(each, weights=True)
        if not _has_no_repr(each):
            return describe(each)
        if any(each is other for other in (*outer, value)):  # a cycle
            return type(each).__qualname__
        return _describe_attributes(each, (*outer, value))

    attributes = getattr(value, "__dict__", {})
    return {"type": type(value).__qualname__, **{name: described(each) for name, each in attributes.items()}}


def _describe_function(function: Any) -> str:
    name = f"{function.__module__}.{function.__qualname__}"
    code = getattr(function, "__code__", None)
    if code is None:
        return name
    bound = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *_closure(function)]
    plain = [each for each in bound if isinstance(each, (bool, int, float, str, tuple, list, dict, type(None)))]
    source = _lambda_source(function, code) if "<lambda>" in name else _source_checksum(function, code)
    parts = [name, str(describe(plain)) if plain else "", source]
    return " ".join(part for part in parts if part)


def _source_checksum(function: Any, code: CodeType) -> str:
    """Return a checksum of the source of a user's function, without comments and layout; empty for libraries."""
    path = str(Path(code.co_filename).resolve())
    if any(path.startswith(folder) for folder in _LIBRARIES):
        return ""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return ""
    return f"{zlib.crc32(ast.unparse(tree).encode()):08x}"


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
