"""Seals: digests by which a file of a run is recognized when it is read again.

A seal covers what a file holds and whose it is: the record of its step, and its name in that step. Damaged files, files
of another run and files that were exchanged do not match theirs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stseg.errors import DamagedFileError


def seal(*parts: Any) -> str:
    """Compute a digest of bytes (or memory), and of values that are JSON-serializable.

    Example:
        >>> len(seal({"lr": 0.1}, b"content")), seal("a", "b") == seal("ab")
        (32, False)
    """
    total = hashlib.sha256()
    for part in parts:
        if not isinstance(part, (bytes, bytearray, memoryview)):
            part = json.dumps(part, sort_keys=True, separators=(",", ":")).encode()
        total.update(f"{len(part)} ".encode())
        total.update(part)
    return total.hexdigest()[:32]


def seal_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Compute a digest of named tensors: names, dtypes, shapes and values.

    Example:
        >>> one = {"weight": torch.zeros(2, 3)}
        >>> seal_tensors(one) == seal_tensors({"weight": torch.zeros(3, 2)})
        False
    """
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]


def what_to_delete(folder: Path, own: Collection[str]) -> str:
    """Name what to delete of a folder: the folder if it holds nothing but files of ours, else these.

    Args:
        folder: the folder.
        own: names of files and folders in it that are ours.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "stage.json").touch()
        >>> what_to_delete(folder, ["stage.json"]) == str(folder)
        True
        >>> (folder / "train.py").touch()
        >>> what_to_delete(folder, ["stage.json"]) == str(folder / "stage.json")
        True
    """
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    ours = [name for name in there if name in own or name == ".lock"]
    if ours == there:
        return str(folder)
    return " and ".join(str(folder / name) for name in ours if name != ".lock")


def damaged(path: Path, what: str, *, to: str, delete: Sequence[Path] = ()) -> DamagedFileError:
    """Return the error of a file that is not as it was written, which says what to delete.

    Args:
        path: the file.
        what: what is wrong, a verb and more.
        to: what the same call then does, after "to".
        delete: what to delete; by default the file itself.

    Example:
        >>> str(damaged(Path("run/model.safetensors"), "is damaged", to="train this stage again"))
        'run/model.safetensors is damaged; delete run/model.safetensors to train this stage again'
    """
    *others, last = [str(each) for each in delete or (path,)]
    return DamagedFileError(f"{path} {what}; delete {', '.join(others)}{' and ' if others else ''}{last} to {to}")
