from __future__ import annotations

import contextlib
import errno
import gc
import multiprocessing
import os
import platform
import random
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from children import in_child, kill, start
from torch.utils.data import DataLoader

from stseg.errors import DamagedFileError, DataWarning, WorkdirMissingError
from stseg.storage import files, folder_lock
from stseg.storage.files import write_atomically
from stseg.storage.folder_lock import FolderLock, check_folders

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs fork and flock")


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    """Refuse at once, so that what is not refused was not waited for either."""
    monkeypatch.setattr(folder_lock, "_PATIENCE", 0.0)


def hold(folder, answer):
    lock = FolderLock(folder)
    answer.send((os.getpid(), lock.acquire()))
    time.sleep(60)


def try_to_acquire(folder, answer):
    lock = FolderLock(folder)
    got = lock.acquire()
    answer.send((got, lock.holder))


class TestExclusion:
    def test_of_another_process_until_it_is_killed(self, tmp_path):
        folder = tmp_path / "deep" / "run"
        process, answer = start(hold, folder)
        pid, acquired = answer.recv()
        assert acquired
        lock = FolderLock(folder)
        assert not lock.acquire()
        assert lock.holder == f"process {pid} on {platform.node()}"
        kill(process)
        assert lock.acquire()
        assert in_child(try_to_acquire, folder) == (False, f"process {os.getpid()} on {platform.node()}")
        lock.release()
        assert in_child(try_to_acquire, folder)[0]

    def test_within_one_process_where_freeing_one_frees_no_other(self, tmp_path):
        first, second, third = (FolderLock(tmp_path) for _ in range(3))
        assert first.acquire()
        assert first.acquire()
        assert not second.acquire()
        second.release()
        del second
        (tmp_path / ".lock").read_bytes()
        assert not third.acquire()
        assert in_child(try_to_acquire, tmp_path)[0] is False
        first.release()
        first.release()
        assert third.acquire()
        first.release()
        assert in_child(try_to_acquire, tmp_path)[0] is False

    def test_of_one_thread_at_a_time(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folder_lock, "_PATIENCE", 60.0)
        monkeypatch.setattr(folder_lock, "_PAUSE", 0.0)
        inside = []

        def work(_):
            lock = FolderLock(tmp_path)
            for _ in range(5):
                assert lock.acquire()
                with lock:
                    inside.append(1)
                    assert len(inside) == 1
                    lock.check()
                    inside.pop()

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))

    def test_of_one_object_that_threads_share(self, tmp_path):
        lock = FolderLock(tmp_path)

        def work(seed):
            choice = random.Random(seed)
            for _ in range(200):
                choice.choice([lock.acquire, lock.release, lock.check])()

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(work, range(6)))
        lock.release()
        assert FolderLock(tmp_path).acquire()

    def test_ends_with_the_block_and_with_the_object(self, tmp_path):
        lock, other = FolderLock(tmp_path), FolderLock(tmp_path)
        assert lock.acquire()
        with pytest.raises(KeyError), lock:
            raise KeyError
        assert other.acquire()
        assert not lock.acquire()
        del other
        gc.collect()
        assert lock.acquire()

    def test_waits_a_moment_for_a_process_that_goes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folder_lock, "_PATIENCE", 60.0)
        first, second = FolderLock(tmp_path), FolderLock(tmp_path)
        assert first.acquire()
        timer = threading.Timer(0.2, first.release)
        timer.start()
        assert second.acquire()
        timer.join()

    @pytest.mark.parametrize("content", [b"", b"process 12", b"\xff\x00", b"process 1 on a\nb\n", b"x" * 5000])
    def test_does_not_name_who_is_not_known(self, tmp_path, content):
        first, second = FolderLock(tmp_path), FolderLock(tmp_path)
        assert first.acquire()
        (tmp_path / ".lock").write_bytes(content)
        assert not second.acquire()
        assert second.holder == "another process"

    def test_a_full_disk_does_not_keep_it_from_locking(self, tmp_path, monkeypatch):
        def write(self, content):
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(folder_lock.OwnFile, "write", write)
        first, second = FolderLock(tmp_path), FolderLock(tmp_path)
        assert first.acquire()
        assert not second.acquire()
        assert second.holder == "another process"

    def test_locks_the_file_that_is_there(self, tmp_path, monkeypatch):
        """Another run may remove the folder between the opening of the file and its lock."""
        lock, removed = folder_lock.OwnFile.lock, []

        def remove_first(file, **options):
            if not removed:
                removed.append(True)
                shutil.rmtree(tmp_path / "run")
            return lock(file, **options)

        monkeypatch.setattr(folder_lock.OwnFile, "lock", remove_first)
        monkeypatch.setattr(folder_lock, "_PATIENCE", 60.0)
        ours = FolderLock(tmp_path / "run")
        assert ours.acquire()
        ours.check()
        monkeypatch.setattr(folder_lock, "_PATIENCE", 0.0)
        assert not in_child(try_to_acquire, tmp_path / "run")[0]


def hold_with_a_child(folder, how, answer):
    lock = FolderLock(folder)
    lock.acquire()
    if how == "fork":
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        pid = child.pid
    elif how == "thread":
        pids = []
        thread = threading.Thread(target=lambda: pids.append(forked()))
        thread.start()
        thread.join()
        pid = pids[0]
    elif how == "exec":
        pid = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False).pid
    else:
        loader = iter(DataLoader(range(4), num_workers=1, multiprocessing_context="fork"))
        next(loader)
        pid = multiprocessing.active_children()[0].pid
    answer.send(pid)
    time.sleep(60)


def forked():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    return pid


def hold_many_and_fork(folder, answer):
    def take(part):
        locks = [FolderLock(folder / f"{part}-{number}") for number in range(40)]
        assert all(lock.acquire() for lock in locks)
        return locks

    with ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(take, part) for part in range(3)]
        children = [forked()]
        while not all(each.done() for each in taken):
            children.append(forked())
        locks = [each.result() for each in taken]
    answer.send(children)
    time.sleep(60)
    del locks


class TestChildren:
    @pytest.mark.parametrize("how", ["fork", "thread", "exec", "DataLoader"])
    def test_do_not_keep_the_lock_of_a_killed_process(self, tmp_path, how, monkeypatch):
        monkeypatch.setattr(folder_lock, "_PATIENCE", 30)  # on a busy machine a child is slow to begin
        process, answer = start(hold_with_a_child, tmp_path, how)
        child = answer.recv()
        kill(process)
        try:
            assert FolderLock(tmp_path).acquire()
            if how != "DataLoader":  # its workers end with their process
                os.kill(child, 0)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    def test_do_not_free_the_lock(self, tmp_path):
        lock = FolderLock(tmp_path)
        assert lock.acquire()

        def work(answer):
            lock.check()
            lock.release()
            lock.__exit__(None, None, None)
            gc.collect()
            answer.send((FolderLock(tmp_path).acquire(), lock.acquire(), check_folders(tmp_path / "a")))

        assert in_child(work) == (False, False, None)
        assert not FolderLock(tmp_path).acquire()
        assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {platform.node()}\n"

    def test_do_not_keep_locks_that_threads_take_meanwhile(self, tmp_path):
        """Without care, a fork between the opening of a file and its entry in the list leaves it open in the child."""
        process, answer = start(hold_many_and_fork, tmp_path)
        children = answer.recv()
        try:
            kill(process)
            folders = list(tmp_path.iterdir())
            assert len(folders) == 120
            locks = [FolderLock(folder) for folder in folders]
            assert all(lock.acquire() for lock in locks)
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)


def as_nobody(function, *arguments):
    """Return what a function returns to a user without rights."""

    def work(answer):
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            answer.send(function(*arguments))
        except Exception as error:
            answer.send(error)

    return in_child(work)


def facts(folder):
    lock = FolderLock(folder)
    acquired = lock.acquire()
    if acquired:
        lock.check()
    return acquired, lock.holder, lock.writable


@pytest.fixture
def folder():
    """A folder that everybody may read; those of pytest are closed."""
    outer = Path(tempfile.mkdtemp())
    outer.chmod(0o755)
    folder = outer / "run"
    folder.mkdir()
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(outer)


class TestAccess:
    def test_a_folder_that_cannot_be_written_is_used_without_a_lock(self, folder):
        folder.chmod(0o555)
        assert as_nobody(facts, folder) == (True, "another process", False)
        assert not any(folder.iterdir())

    def test_the_lock_in_a_folder_that_cannot_be_written_is_honored(self, folder):
        lock = FolderLock(folder)
        assert lock.acquire()
        (folder / ".lock").chmod(0o444)
        folder.chmod(0o555)
        assert as_nobody(facts, folder) == (False, f"process {os.getpid()} on {platform.node()}", False)
        lock.release()
        assert as_nobody(facts, folder) == (True, "another process", False)
        assert (folder / ".lock").read_bytes() == b""

    def test_one_that_only_reads_keeps_others_out(self, folder):
        (folder / ".lock").touch(0o444)
        folder.chmod(0o555)

        def hold_and_look():
            lock = FolderLock(folder)
            assert lock.acquire()
            return facts(folder)

        assert as_nobody(hold_and_look) == (False, "another process", False)

    def test_a_lock_of_another_user_in_a_folder_that_can_be_written(self, folder):
        (folder / ".lock").touch(0o644)
        (folder / ".lock").chmod(0o644)
        folder.chmod(0o777)
        assert as_nobody(facts, folder) == (True, "another process", True)

    def test_a_lock_that_cannot_be_opened_counts_as_no_right_to_write(self, folder):
        (folder / ".lock").touch(0o600)
        folder.chmod(0o777)
        if os.geteuid() != 0:
            (folder / ".lock").chmod(0)
        assert as_nobody(facts, folder) == (True, "another process", False)

    def test_a_folder_that_cannot_be_made_is_an_error(self, folder):
        folder.chmod(0o555)
        error = as_nobody(facts, folder / "inner")
        assert isinstance(error, PermissionError)
        assert str(folder / "inner") in str(error)

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
    @pytest.mark.parametrize("exists", [False, True])
    def test_a_file_system_without_writing(self, tmp_path, monkeypatch, number, exists):
        if exists:
            (tmp_path / ".lock").touch()

        def open_(path, flags, *rest, real=os.open, **options):
            if str(path).endswith(".lock") and flags & os.O_RDWR:
                raise OSError(number, os.strerror(number), path)
            return real(path, flags, *rest, **options)

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(os, "access", lambda *_, **__: False)
        assert facts(tmp_path) == (True, "another process", False)
        first, second = FolderLock(tmp_path), FolderLock(tmp_path)
        assert (first.acquire(), second.acquire()) == (True, not exists)

    def test_a_file_system_that_locks_files_for_reading_only_in_common(self, tmp_path, monkeypatch):
        def flock(file, how, real=folder_lock.fcntl.flock):
            if not file.writable() and how & folder_lock.fcntl.LOCK_EX:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            real(file, how)

        holder = FolderLock(tmp_path)
        assert holder.acquire()
        monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
        real = os.open

        def open_(path, flags, *rest):
            if flags & os.O_RDWR:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
            return real(path, flags, *rest)

        monkeypatch.setattr(os, "open", open_)
        lock = FolderLock(tmp_path)
        assert not lock.acquire()
        holder.release()
        assert lock.acquire()

    @pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
    def test_a_file_system_without_locks_is_warned_of(self, tmp_path, monkeypatch, number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
        lock = FolderLock(tmp_path)
        with pytest.warns(
            DataWarning, match=f"the file system of {tmp_path} has no locks: .* one run at a time"
        ) as got:
            assert lock.acquire()
        assert got[0].filename == __file__
        lock.check()
        (tmp_path / ".lock").unlink()
        with pytest.raises(WorkdirMissingError):
            lock.check()
        lock.release()
        other = FolderLock(tmp_path / "other")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(DataWarning):
                other.acquire()
        shutil.rmtree(tmp_path / "other")
        check_folders(tmp_path / "other" / "a")

    def test_other_errors_of_locks_come_out_with_the_path(self, tmp_path, monkeypatch):
        def flock(*_):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
        with pytest.raises(OSError, match=r"\.lock") as caught:
            FolderLock(tmp_path).acquire()
        assert caught.value.errno == errno.EIO

    def test_a_system_without_locks_is_silent(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folder_lock, "fcntl", None)
        first, second = FolderLock(tmp_path / "run"), FolderLock(tmp_path / "run")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert first.acquire()
            assert second.acquire()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(WorkdirMissingError):
            first.check()

    def test_a_folder_in_place_of_the_file_is_an_error(self, tmp_path):
        (tmp_path / ".lock").mkdir()
        expected = f"{tmp_path}/.lock is a folder; expected a file; delete {tmp_path}/.lock to use {tmp_path}"
        for exclusive in (True, False):
            with pytest.raises(DamagedFileError) as caught:
                FolderLock(tmp_path, exclusive=exclusive).acquire()
            assert str(caught.value) == expected

    def test_a_file_in_place_of_the_folder_is_an_error(self, tmp_path):
        (tmp_path / "a").touch()
        for folder in (tmp_path / "a", tmp_path / "a" / "b"):
            with pytest.raises(NotADirectoryError) as caught:
                FolderLock(folder).acquire()
            assert caught.value.filename == str(folder)

    def test_the_file_may_be_locked_by_all_that_the_umask_lets(self, tmp_path):
        before = os.umask(0o002)
        try:
            assert FolderLock(tmp_path).acquire()
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == 0o664


def remove(folder):
    shutil.rmtree(folder)


def move(folder):
    folder.rename(folder.with_name("moved"))


def replace(folder):
    move(folder)
    folder.mkdir()


def replace_with_a_copy(folder):
    move(folder)
    shutil.copytree(folder.with_name("moved"), folder)


def replace_with_a_file(folder):
    remove(folder)
    folder.touch()


def move_what_is_above(folder):
    folder.parent.rename(folder.parent.with_name("moved"))


HOW = [remove, move, replace, replace_with_a_copy, replace_with_a_file, move_what_is_above]


def content(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("change", HOW)
class TestWatch:
    def acquired(self, folder, exclusive):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".lock").touch()
        lock = FolderLock(folder, exclusive=exclusive)
        assert lock.acquire()
        return lock

    def test_nothing_is_written_into_a_folder_that_is_gone(self, tmp_path, change, exclusive):
        folder = tmp_path / "above" / "run"
        lock = self.acquired(folder, exclusive)
        write_atomically(folder / "step" / "a", lambda file: file.write(b"x"))
        change(folder)
        before = content(tmp_path)
        message = f"^{folder} was removed or moved while it was in use.*; start the run again"
        for path in (folder / "step" / "a", folder / "new" / "b", folder / "c", folder):
            with pytest.raises(WorkdirMissingError, match=message):
                write_atomically(path, lambda file: file.write(b"x"))
        with pytest.raises(WorkdirMissingError, match=message):
            lock.check()
        with pytest.raises(WorkdirMissingError, match=message):
            check_folders(folder / "d")
        with pytest.raises(WorkdirMissingError, match=message):
            FolderLock(folder / "inner").acquire()
        assert content(tmp_path) == before
        write_atomically(tmp_path / "run2" / "a", lambda file: file.write(b"x"))
        lock.release()
        lock.check()
        if change is not replace_with_a_file:
            write_atomically(folder / "step" / "a", lambda file: file.write(b"x"))

    @pytest.mark.parametrize("at", ["write", "mkdir", "open"])
    def test_nor_if_it_goes_during_the_write(self, tmp_path, monkeypatch, change, exclusive, at):
        folder = tmp_path / "above" / "run"
        lock = self.acquired(folder, exclusive)
        done = []

        def change_once(*_, **__):
            if not done:
                done.append(True)
                change(folder)

        def first(real):
            def changed(*arguments, **options):
                change_once()
                return real(*arguments, **options)

            return changed

        if at == "mkdir":
            monkeypatch.setattr(files, "_make_folder", first(files._make_folder))
        if at == "open":
            monkeypatch.setattr(files, "_Temporary", first(files._Temporary))
        with pytest.raises(WorkdirMissingError):
            write_atomically(folder / "a", (lambda file: change_once()) if at == "write" else lambda file: None)
        assert not (folder / "a").exists()
        assert folder.exists() == change.__name__.startswith("replace")
        lock.release()


class TestWatched:
    def test_the_run_goes_on_if_the_folder_is_moved_back(self, tmp_path):
        lock = FolderLock(tmp_path / "run")
        assert lock.acquire()
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(WorkdirMissingError):
            lock.check()
        (tmp_path / "moved").rename(tmp_path / "run")
        lock.check()
        write_atomically(tmp_path / "run" / "a", lambda file: file.write(b"x"))

    def test_the_file_of_the_lock_alone(self, tmp_path):
        lock = FolderLock(tmp_path)
        assert lock.acquire()
        (tmp_path / ".lock").unlink()
        with pytest.raises(
            WorkdirMissingError, match=r"was removed or moved while it was in use, or its file \.lock was;"
        ):
            lock.check()

    def test_by_each_of_its_names(self, tmp_path, monkeypatch):
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        lock = FolderLock(tmp_path / "link" / "run")
        assert lock.acquire()
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(tmp_path / "real" / "run")
        for path in ("link/run/a", tmp_path / "link/run/a", tmp_path / "real/run/a", tmp_path / "b/../link/run/a"):
            with pytest.raises(WorkdirMissingError):
                write_atomically(Path(path), lambda file: file.write(b"x"))
        check_folders(tmp_path / "link" / "run2")
        check_folders(tmp_path / "link")

    def test_a_relative_one_after_a_change_of_folder(self, tmp_path, monkeypatch):
        for name in ("here", "there"):
            (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / "here")
        lock = FolderLock(Path("run"))
        assert lock.acquire()
        monkeypatch.chdir(tmp_path / "there")
        lock.check()
        check_folders(Path("run/a"))
        shutil.rmtree(tmp_path / "here" / "run")
        check_folders(Path("run/a"))
        with pytest.raises(WorkdirMissingError, match=str(tmp_path / "here" / "run")):
            lock.check()

    def test_a_new_run_may_begin_where_the_folder_of_an_old_one_was_deleted(self, tmp_path):
        """In a notebook, the run that failed may still be there."""
        old = FolderLock(tmp_path / "run")
        assert old.acquire()
        shutil.rmtree(tmp_path / "run")
        new = FolderLock(tmp_path / "run")
        assert new.acquire()
        write_atomically(tmp_path / "run" / "a", lambda file: file.write(b"x"))
        with pytest.raises(WorkdirMissingError):
            old.check()
        old.release()
        new.check()
        assert not FolderLock(tmp_path / "run").acquire()

    def test_errors_that_say_nothing_of_it_come_out(self, tmp_path, monkeypatch):
        lock = FolderLock(tmp_path)
        assert lock.acquire()

        def fail(path, *_, **__):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

        with monkeypatch.context() as patched:
            patched.setattr(os, "stat", fail)
            with pytest.raises(OSError, match=r"\.lock"):
                lock.check()
        lock.check()

    def test_many_processes_of_a_run_share_it(self, tmp_path):
        first = FolderLock(tmp_path)
        assert first.acquire()
        others = [FolderLock(tmp_path, exclusive=False) for _ in range(3)]
        assert all(other.acquire() for other in others)
        first.release()
        second = FolderLock(tmp_path)
        assert second.acquire()
        for other in others:
            other.check()
            other.release()
        assert not FolderLock(tmp_path).acquire()

    def test_a_process_of_the_run_on_another_node_makes_no_folder(self, tmp_path):
        lock = FolderLock(tmp_path / "run", exclusive=False)
        assert lock.acquire()
        lock.check()
        assert not any(tmp_path.iterdir())
