"""Atomic writes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from stseg.errors import DamagedFileError
from stseg.storage.folder_lock import OwnFile, check_folders, is_below_one_in_use, is_in_use
from stseg.storage.seals import damaged

try:
    import fcntl
except ImportError:  # not available on Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.part")
_KINDS = {"workdir": "work directory", "store": "store", "out": "folder"}
_TRIES = 10  # names of a temporary file, if others remove it before it is locked


def absolute_folder(folder: str | os.PathLike[str] | None, name: str = "workdir") -> Path | None:
    """Return a folder as an absolute path, which a later change of the current folder does not move.

    Raises:
        ValueError: if it is an empty string, which would mean the current folder.
        NotADirectoryError: if it, or one above, is a file.

    Example:
        >>> absolute_folder("runs/first").is_absolute(), absolute_folder(None)
        (True, None)
    """
    if folder is None:
        return None
    if os.fspath(folder) == "":
        raise ValueError(f"{name} is an empty string; expected a folder, or None for none ('.' is the current one)")
    path = Path(folder).absolute()
    for place in (path, *path.parents):
        if place.exists():
            if not place.is_dir():
                above = "" if place == path else f"is in {place}, which "
                raise NotADirectoryError(f"the {_KINDS[name]} {path} {above}is a file; expected a folder")
            break
    return path


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically.

    ``write`` fills a temporary file in the same folder, which then replaces ``path`` in one step: a process
    killed at any moment leaves either the old or the new file. So does an error. What is written through the descriptor
    of the file, not the file, is not checked to be complete.

    Raises:
        OSError: if the system cannot write the file, as on a full disk, with the path; also where ``write`` made
            another error of it.
        DamagedFileError: in a folder in use, if a folder is in place of the file, or a file in place of its folder.
        WorkdirMissingError: if the folder is in one that was removed or moved while this process uses it.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "notes" / "a.txt"
        >>> write_atomically(path, lambda file: file.write(b"whole"))
        >>> path.read_bytes()
        b'whole'
    """
    check_folders(path)
    try:
        _make_folder(path.parent)
        with _Temporary(path.parent) as temporary:
            temporary.fill(write)
            check_folders(path)
            os.replace(temporary.path, path)
    except OSError as error:
        if not _is_of(error, path):
            raise
        check_folders(path)
        raise misplaced(path) or OSError(error.errno, error.strerror, str(path)) from error


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of writers that were killed, in a folder and all those below.

    Those of live writers, in this process or another, stay, as does every other file. Where the system or the file
    system has no locks, all stay.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / ".0123456789abcdef.part").write_bytes(b"half")
        >>> remove_leftovers(folder)
        >>> list(folder.iterdir())
        []
    """
    if fcntl is None:
        return
    for parent, _, names in os.walk(folder):
        for name in filter(_TEMPORARY.fullmatch, names):
            _remove_if_left(Path(parent, name))


def misplaced(path: Path) -> DamagedFileError | None:
    """Return the error of a folder in place of a file, or a file in place of one of its folders, if there is one.

    Only in folders that are in use by this process: what lies elsewhere is not to be deleted.
    """
    if not is_below_one_in_use(path):
        return None
    if os.path.isdir(path) and not os.path.islink(path):
        return damaged(path, "is a folder; expected a file", to="write it again")
    for parent in path.parents:
        if os.path.lexists(parent):
            if os.path.isdir(parent):
                return None
            if not is_below_one_in_use(parent):
                return None
            kind = "a file" if os.path.exists(parent) else "a broken link"
            return damaged(parent, f"is {kind}; expected a folder", to=f"write {path}")
    return None


class _Recorded(OwnFile):
    """File that remembers the first error of a write, which writers such as torch.save make another one of."""

    error: tuple[Any, ...] | None = None

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            self.error = self.error or error.args
            raise


class _Temporary:
    """Temporary file in a folder, locked while its writer is alive; removed at the end unless it was moved."""

    def __init__(self, folder: Path) -> None:
        for left in reversed(range(_TRIES)):
            self.path = folder / f".{secrets.token_hex(8)}.part"
            self._file = _Recorded(self.path, "xb")
            self._lock: OwnFile | None = None
            try:
                if self._is_kept() or not left:
                    return
            except BaseException:
                self._end()
                raise
            self._end()

    def fill(self, write: Callable[[BinaryIO], object]) -> None:
        """Fill the file, and close it."""
        file = io.BufferedWriter(self._file)
        try:
            write(file)
        except Exception:
            if self._file.error is not None:
                raise OSError(*self._file.error) from None
            raise
        if self._file.error is not None:  # what was not written may be lost, even if later writes succeeded
            raise OSError(*self._file.error)
        file.flush()
        os.fsync(file.fileno())
        file.close()

    def __enter__(self) -> _Temporary:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._close()
        else:
            self._end()

    def _is_kept(self) -> bool:
        """Lock the file; False if another process took it for that of a dead writer before it was locked."""
        if fcntl is None:
            return True  # a file that is open could not be moved
        self._lock = self._file.twin()
        try:
            return self._lock.lock() and self._lock.is_at(self.path)
        except OSError:  # file system without locks
            return True

    def _end(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)  # where a file that is open cannot be removed

    def _close(self) -> None:
        try:
            self._file.close()  # without what may be left in the buffer
        finally:
            if self._lock is not None:
                self._lock.unlock()


def _remove_if_left(path: Path) -> None:
    with contextlib.suppress(OSError):  # vanished, of somebody else, or a file system without locks
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return
        file = OwnFile(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK))
        try:
            if file.lock():
                path.unlink()
        finally:
            file.unlock()


def _make_folder(folder: Path) -> None:
    """Make a folder and those above, but not one in use, which was removed if it is not there."""
    if is_in_use(folder):
        return
    try:
        folder.mkdir(exist_ok=True)
    except FileNotFoundError:
        if folder.parent == folder:
            raise
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)


def _is_of(error: OSError, path: Path) -> bool:
    """Return whether an error is one of the system with a file or its folders, not with one read for it."""
    if error.errno is None or type(error) is not type(OSError(error.errno, "")):
        return False
    name = error.filename
    if not isinstance(name, (str, bytes)):
        return True
    found = Path(os.fsdecode(name))
    return found in (path, *path.parents) or _TEMPORARY.fullmatch(found.name) is not None
