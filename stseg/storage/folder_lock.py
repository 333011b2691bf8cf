"""Locks that last as long as their process, and a watch on folders that are removed or moved while they are in use."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import platform
import re
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from stseg.distributed import all_gather, rank
from stseg.errors import DamagedFileError, DataWarning, WorkdirInUseError, WorkdirMissingError
from stseg.storage.seals import damaged

try:
    import fcntl
except ImportError:  # not available on Windows
    fcntl = None  # type: ignore[assignment]

_PATIENCE = 2.0  # seconds to wait for a lock: a killed process may take a moment to go
_PAUSE = 0.05
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)

# No process is forked between the opening of a file and its entry in the list of those that the child closes.
_opening = threading.RLock()
_own: weakref.WeakSet[OwnFile] = weakref.WeakSet()
_watches: set[_Watch] = set()


class OwnFile(io.FileIO):
    """A file of this process alone, so that its lock ends with the process: forked children close it at once.

    Example:
        >>> import tempfile
        >>> file = OwnFile(Path(tempfile.mkdtemp()) / "a", "xb")
        >>> file.write(b"whole"), file.close()
        (5, None)
    """

    def __init__(self, file: Path, mode: str, opener: Callable[[str, int], int] | None = None) -> None:
        with _opening:
            super().__init__(os.fspath(file), mode, opener=opener)
            _own.add(self)

    def close(self) -> None:
        """Close the file; its lock lasts until all its twins are closed."""
        try:
            super().close()
        finally:
            _own.discard(self)

    def twin(self) -> OwnFile:
        """Return a second descriptor of the open file, which shares its lock."""
        return OwnFile(Path(os.fsdecode(self.name)), "wb", opener=lambda *_: os.dup(self.fileno()))

    def lock(self, *, shared: bool = False) -> bool:
        """Lock the file against all that opened it on their own, in this process too; False if one of them holds it.

        Raises:
            OSError: if the system or the file system has no locks.
        """
        if fcntl is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), self.name)
        try:
            fcntl.flock(self, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def unlock(self) -> None:
        """Free the lock, for all twins, and close the file."""
        # Closing would not do if a child was forked during the call.
        if fcntl is not None and not self.closed:
            with contextlib.suppress(OSError):
                fcntl.flock(self, fcntl.LOCK_UN)
        self.close()

    def is_at(self, path: str | Path) -> bool:
        """Return whether this file, and no other one, is at a path."""
        try:
            return os.path.samestat(os.fstat(self.fileno()), os.stat(path))
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise


class FolderLock:
    """Lock of a folder against other runs, and a watch on whether the folder is still there.

    The lock is an open file, ``.lock`` in the folder. It lasts until ``release``, the end of the process, however it
    comes, or of this object. Two locks exclude each other in one process as well. Children that are forked have no part
    in it. While it is held, nothing is written into a folder that was put in place of this one.

    Args:
        folder: the folder, made when it is acquired.
        exclusive: False for the other processes of a distributed run, which watch the folder without locking it.

    Attributes:
        holder: after a refusal, who holds the lock: "process 1234 on host", or "another process" if it is not known.
        writable: whether files can be made in the folder, once it is acquired.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> lock, other = FolderLock(folder), FolderLock(folder)
        >>> lock.acquire(), other.acquire(), other.holder == f"process {os.getpid()} on {platform.node()}"
        (True, False, True)
        >>> with lock:
        ...     lock.check()
        >>> other.acquire()
        True
        >>> other.release()
    """

    def __init__(self, folder: Path, *, exclusive: bool = True) -> None:
        self.folder = folder
        self.exclusive = exclusive
        self.holder = "another process"
        self.writable = True
        self._watch: _Watch | None = None

    def acquire(self) -> bool:
        """Lock the folder, making it if needed; False if another run holds it, after waiting two seconds for it.

        A folder that cannot be written is locked if there is a file to lock.

        Warns:
            DataWarning: if the file system has no locks; the folder then counts as locked.

        Raises:
            DamagedFileError: if ``.lock`` is no file.
            NotADirectoryError: if the folder is a file.
            WorkdirMissingError: if the folder is in one that was removed or moved while it was in use.
            OSError: if the folder cannot be made.
        """
        until = time.monotonic() + _PATIENCE
        while (locked := self._try()) is None:
            if time.monotonic() >= until:
                return False
            time.sleep(_PAUSE)
        if not locked and fcntl is not None:
            self._warn()
        return True

    def release(self) -> None:
        """Free the lock, if it is held."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    def check(self) -> None:
        """Check that the folder is still there; does nothing while it is not acquired, or in a child.

        Raises:
            WorkdirMissingError: if it was removed, moved or replaced.
        """
        watch = self._watch
        if watch is not None and watch.open:
            watch.check(str(watch.folder))

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"FolderLock({str(self.folder)!r}{'' if self.exclusive else ', exclusive=False'})"

    def _try(self) -> bool | None:
        """Try once: None if another run holds the lock, False if there are no locks."""
        with _opening:
            if self._watch is not None and self._watch.open:
                return True
            if self.exclusive:
                self._make_folder()
            file = self._open()
            locked: bool | None = True
            if file is not None and self.exclusive:
                try:
                    locked = self._lock(file)
                except BaseException:
                    file.close()
                    raise
            if locked is None:
                return None
            if file is None and not self.folder.is_dir():  # on another node
                return True
            self._watch = _Watch(self.folder, file)
            weakref.finalize(self, self._watch.close)
            return locked

    def _make_folder(self) -> None:
        for watch in list(_watches):  # a run before this one, whose folder was deleted to start over
            if watch.is_of(self.folder) and not watch.intact(str(watch.folder)):
                _watches.discard(watch)
        check_folders(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.folder)) from None

    def _open(self) -> OwnFile | None:
        """Open the file of the lock, for writing where that is possible; None if it cannot be opened."""
        path = self.folder / ".lock"
        can = {"effective_ids": True} if os.access in os.supports_effective_ids else {}
        self.writable = os.access(self.folder, os.W_OK | os.X_OK, **can)
        if self.exclusive:
            try:
                return OwnFile(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o666))
            except OSError as error:
                if path.is_dir():
                    raise _no_file(path) from error
                if error.errno not in _NO_ACCESS:
                    raise
        try:
            return OwnFile(path, "rb")
        except IsADirectoryError as error:
            raise _no_file(path) from error
        except OSError as error:
            if error.errno not in (*_NO_ACCESS, *_GONE):
                raise
            self.writable = self.writable and not self.exclusive
            return None

    def _lock(self, file: OwnFile) -> bool | None:
        """Lock an open file: None if another run holds it, False if there are no locks."""
        try:
            try:
                taken = file.lock()
            except OSError as error:
                if error.errno != errno.EBADF or file.writable():
                    raise
                taken = file.lock(shared=True)  # NFS has no exclusive locks of files that are open for reading
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, error.strerror, str(self.folder / ".lock")) from error
            return False
        if not taken:
            self.holder = _read_holder(file)
            file.close()
            return None
        if not file.is_at(self.folder / ".lock"):  # removed since it was opened
            file.unlock()
            return None
        _write_holder(file)
        return True

    def _warn(self) -> None:
        try:
            warnings.warn(
                f"the file system of {self.folder} has no locks: nothing keeps a second run out of this folder; see to "
                "it that one run at a time uses it",
                DataWarning,
                stacklevel=3,
            )
        except BaseException:  # warnings that were made errors
            self.release()
            raise


class _Watch:
    """Watch on a folder, and the file of its lock; None if the folder has no such file."""

    def __init__(self, folder: Path, file: OwnFile | None) -> None:
        self.folder = folder.absolute()
        self.names = {os.path.normcase(name(folder)) for name in (os.path.abspath, os.path.realpath)}
        self.file = file
        self._left_to_close = [True]
        _watches.add(self)

    @property
    def open(self) -> bool:
        return self.file is None or not self.file.closed

    def is_of(self, path: str | Path) -> bool:
        return os.path.normcase(os.path.abspath(path)) in self.names

    def names_above(self, path: str) -> list[str]:
        """Return the names of the folder, as it was given and without symbolic links, that a path is below."""
        return [name for name in self.names if os.path.join(path, "").startswith(os.path.join(name, ""))]

    def intact(self, name: str) -> bool:
        file = self.file
        if file is None:
            return os.path.isdir(name)
        try:
            found = file.is_at(os.path.join(name, ".lock"))
        except (OSError, ValueError):
            found = False
            if not file.closed:
                raise
        return found or file.closed  # released by another thread meanwhile

    def check(self, name: str) -> None:
        if not self.intact(name):
            what = ", or its file .lock was" if os.path.isdir(name) else ""
            raise WorkdirMissingError(
                f"{self.folder} was removed or moved while it was in use{what}; start the run again (with the folder "
                "moved back, it goes on where it was)"
            )

    def close(self) -> None:
        _watches.discard(self)
        try:
            self._left_to_close.pop()  # by one thread only: another file may get the number of the descriptor at once
        except IndexError:
            return
        if self.file is not None and not self.file.closed:
            if self.file.writable():
                with contextlib.suppress(OSError):
                    self.file.truncate(0)
            self.file.unlock()


@contextlib.contextmanager
def hold_folder(folder: Path | None) -> Iterator[None]:
    """Keep other runs out of a folder; all processes of a run call it together.

    Args:
        folder: the folder; None does nothing.

    Raises:
        WorkdirInUseError: if another run holds the folder.
        DamagedFileError, OSError: as :meth:`FolderLock.acquire`.

    Example:
        >>> import tempfile
        >>> with hold_folder(Path(tempfile.mkdtemp())) as none:
        ...     pass
    """
    if folder is None:
        yield
        return
    lock = FolderLock(folder, exclusive=rank() == 0)
    with lock:
        held = rank() != 0 or lock.acquire()
        if not all_gather(held)[0]:
            raise WorkdirInUseError(
                f"{folder} is in use by {lock.holder}; expected one run in it at a time: wait for that run, end it, or "
                "use another folder"
            )
        if rank() != 0:
            lock.acquire()
        yield


def check_folders(path: Path) -> None:
    """Check that the folders in use in this process that a path is in are still there, before anything is made in them.

    Raises:
        WorkdirMissingError: if one was removed, moved or replaced since its :class:`FolderLock` was acquired.

    Example:
        >>> import shutil, tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "run"
        >>> lock = FolderLock(folder)
        >>> lock.acquire(), check_folders(folder / "step" / "model.pt")
        (True, None)
        >>> shutil.rmtree(folder)
        >>> check_folders(folder / "step" / "model.pt")
        Traceback (most recent call last):
        stseg.errors.WorkdirMissingError: ...run was removed or moved while it was in use; start the run again ...
        >>> lock.release()
    """
    if _watches:
        absolute = os.path.normcase(os.path.abspath(path))
        for watch in list(_watches):
            for name in watch.names_above(absolute):
                watch.check(name)


def is_in_use(folder: Path) -> bool:
    """Return whether a :class:`FolderLock` of this process is on a folder, which then must not be made again.

    Example:
        >>> is_in_use(Path("nowhere"))
        False
    """
    return any(watch.is_of(folder) for watch in list(_watches))


def is_below_one_in_use(path: Path) -> bool:
    """Return whether a path is in, or is, a folder that a :class:`FolderLock` of this process is on.

    Example:
        >>> is_below_one_in_use(Path("nowhere"))
        False
    """
    absolute = os.path.normcase(os.path.abspath(path))
    return any(watch.names_above(absolute) for watch in list(_watches))


def _no_file(path: Path) -> DamagedFileError:
    return damaged(path, "is a folder; expected a file", to=f"use {path.parent}")


def _write_holder(file: OwnFile) -> None:
    if file.writable():
        with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
            file.seek(0)
            file.truncate()
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())


def _read_holder(file: OwnFile) -> str:
    try:
        file.seek(0)
        text = file.read(1000).decode(errors="replace").strip()
    except OSError:
        text = ""
    return text if re.fullmatch(r"process \d+ on \S+", text) else "another process"


def _begin_in_child() -> None:
    try:
        for file in list(_own):
            with contextlib.suppress(OSError):
                file.close()  # not unlocked: the lock is the parent's
        _own.clear()
        _watches.clear()
    finally:
        _opening.release()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_begin_in_child)
