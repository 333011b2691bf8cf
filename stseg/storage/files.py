"""Atomic writes and file locks."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not available on Windows
    fcntl = None  # type: ignore[assignment]


def absolute_folder(folder: str | os.PathLike[str] | None, name: str = "workdir") -> Path | None:
    """Return a folder as an absolute path, which a later change of the current folder does not move.

    Raises:
        ValueError: if it is an empty string, which would mean the current folder.

    Example:
        >>> absolute_folder("runs/first").is_absolute(), absolute_folder(None)
        (True, None)
    """
    if folder is None:
        return None
    if os.fspath(folder) == "":
        raise ValueError(f"{name} is an empty string; expected a folder, or None for none ('.' is the current one)")
    return Path(folder).absolute()


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically.

    ``write`` fills a temporary file in the same folder, which then replaces ``path`` in one step: a process
    killed at any moment leaves either the old or the new file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes" / "a.txt"
        >>> write_atomically(path, lambda file: file.write(b"whole"))
        >>> path.read_bytes()
        b'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(8)}.part"
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def lock(path: Path) -> int | None:
    """Lock a file for this process, creating it if needed; the system releases the lock when the process ends.

    Returns:
        A file descriptor to close when the lock is no longer needed; None if another process holds it.

    Example:
        >>> import tempfile
        >>> descriptor = lock(Path(tempfile.mkdtemp()) / "run" / ".lock")
        >>> os.close(descriptor)
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(descriptor)
        return None
    except OSError:  # file system without locks
        pass
    return descriptor
