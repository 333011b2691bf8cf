from __future__ import annotations

import contextlib
import errno
import io
import itertools
import multiprocessing
import os
import signal
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from children import kill
from children import start as start_answering
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import stseg
from stseg.errors import DamagedFileError
from stseg.storage import files
from stseg.storage.files import remove_leftovers, write_atomically
from stseg.storage.folder_lock import FolderLock, OwnFile

needs_fork = pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")


def start(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def test_makes_the_folders_above(tmp_path):
    write_atomically(tmp_path / "a" / "b" / "c.bin", lambda file: file.write(b"whole"))
    assert (tmp_path / "a" / "b" / "c.bin").read_bytes() == b"whole"


def test_replaces_what_is_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"something longer than what comes")
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_shows_nothing_before_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b" and half")

    write_atomically(path, write)
    assert path.read_bytes() == b"half and half"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaves_the_old_file_and_no_other_if_writing_fails(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_bytes() == b"old"


def test_leaves_no_other_file_if_the_place_is_taken_by_a_folder(tmp_path):
    (tmp_path / "a.txt" / "inside").mkdir(parents=True)
    expected = f"{tmp_path / 'a.txt'} is a folder; expected a file; delete {tmp_path / 'a.txt'} to write it again"
    with pytest.raises(IsADirectoryError) as elsewhere:
        write_atomically(tmp_path / "a.txt", lambda file: file.write(b"new"))
    assert elsewhere.value.filename == str(tmp_path / "a.txt")
    with used(tmp_path), pytest.raises(DamagedFileError) as caught:
        write_atomically(tmp_path / "a.txt", lambda file: file.write(b"new"))
    assert str(caught.value) == expected
    (tmp_path / ".lock").unlink()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@contextlib.contextmanager
def used(folder):
    """A folder in use by this process."""
    with FolderLock(folder) as lock:
        assert lock.acquire()
        yield


@pytest.mark.parametrize("below", ["b.txt", "deep/below/b.txt"])
def test_names_the_file_that_is_in_place_of_a_folder(tmp_path, below):
    place = tmp_path / "a"
    place.write_bytes(b"old")
    with pytest.raises((NotADirectoryError, FileExistsError), match=str(place / below)):
        write_atomically(place / below, lambda file: file.write(b"new"))
    message = f"{place} is a file; expected a folder; delete {place} to write "
    with used(tmp_path), pytest.raises(DamagedFileError, match=message):
        write_atomically(place / below, lambda file: file.write(b"new"))
    assert place.read_bytes() == b"old"
    place.unlink()
    place.symlink_to(tmp_path / "nowhere")
    with (
        used(tmp_path),
        pytest.raises(DamagedFileError, match=f"{place} is a broken link; expected a folder; delete {place} to write "),
    ):
        write_atomically(place / below, lambda file: file.write(b"new"))


def test_a_link_to_a_folder_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "a").symlink_to("folder")
    write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new"
    assert not any((tmp_path / "folder").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_files_get_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.txt", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def write_for_ever(path):
    for number in itertools.count():

        def write(file, byte=bytes([number % 256])):
            for _ in range(64):
                file.write(byte * 4096)

        write_atomically(path, write)


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
@pytest.mark.parametrize("delay", [0.0, 0.013, 0.029])
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path, delay):
    path = tmp_path / "a.bin"
    writer = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
    writer.start()
    while not path.exists():
        assert writer.is_alive()
        time.sleep(0.001)
    time.sleep(delay)
    writer.kill()
    writer.join()
    content = path.read_bytes()
    assert len(content) == 64 * 4096
    assert len(set(content)) == 1


def save_png(file):
    Image.fromarray(np.random.default_rng(0).integers(256, size=(100, 100, 3), dtype=np.uint8)).save(file, format="PNG")


def save_jpeg(file):
    """Write through the descriptor of the file, as PIL does for most formats."""
    Image.fromarray(np.random.default_rng(0).integers(256, size=(200, 200, 3), dtype=np.uint8)).save(
        file, format="JPEG"
    )


def save_figure(file):
    figure = Figure()
    figure.figimage(np.random.default_rng(0).random((99, 99)))
    figure.savefig(file, format="png")


def save_over_itself(file):
    """Write, and go back and forth."""
    file.write(bytes(30_000))
    at = file.tell()
    file.seek(10)
    file.write(b"header")
    file.seek(at)
    file.write(b"end")


WRITERS = {
    "torch": lambda file: torch.save({"a": torch.zeros(40_000), "b": [torch.zeros(300)] * 3}, file),
    "PNG": save_png,
    "JPEG": save_jpeg,
    "figure": save_figure,
    "bytes": lambda file: file.write(b"x" * 30_000),
    "small": lambda file: file.write(b"x" * 1500),  # the buffer holds it until the end
    "many": lambda file: [file.write(b"line\n") for _ in range(6000)],
    "seeking": save_over_itself,
}
THROUGH_THE_FILE = sorted(WRITERS.keys() - {"JPEG"})  # PIL does not notice if the descriptor takes only a part


@pytest.mark.parametrize("name", WRITERS)
def test_writers_get_a_file_as_they_know_it(tmp_path, name):
    write_atomically(tmp_path / "ours", WRITERS[name])
    with open(tmp_path / "plain", "wb") as file:
        WRITERS[name](file)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "plain").read_bytes()


@contextlib.contextmanager
def files_of_at_most(length):
    """Limit the length of files, in bytes, as a full disk does."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.name != "posix", reason="needs limits of POSIX")
@pytest.mark.parametrize(
    ("name", "limit"),
    [("JPEG", 0), *itertools.product(THROUGH_THE_FILE, [0, 1000, 8192])],
)
def test_a_full_disk_is_an_error_of_the_system_with_the_path(tmp_path, name, limit):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    if name == "small" and limit > 1500:
        with files_of_at_most(limit):
            write_atomically(path, WRITERS[name])
    else:
        with pytest.raises(OSError, match=r"a\.bin") as caught, files_of_at_most(limit):
            write_atomically(path, WRITERS[name])
        assert (type(caught.value), caught.value.errno, caught.value.filename) == (OSError, errno.EFBIG, str(path))
        assert os.listdir(tmp_path) == ["a.bin"]
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", THROUGH_THE_FILE)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES])
def test_the_first_error_of_a_write_comes_out_even_if_later_ones_succeed(tmp_path, monkeypatch, name, number):
    failed = []

    def write(file, content):
        if not failed:
            failed.append(True)
            raise OSError(number, os.strerror(number))
        return io.FileIO.write(file, content)

    monkeypatch.setattr(OwnFile, "write", write)
    with pytest.raises(OSError, match=r"a\.bin") as caught:
        write_atomically(tmp_path / "a.bin", WRITERS[name])
    assert type(caught.value) is type(OSError(number, ""))
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "a.bin"))
    assert not any(tmp_path.iterdir())


def test_an_error_that_the_writer_swallows_comes_out(tmp_path, monkeypatch):
    def write(file):
        monkeypatch.setattr(OwnFile, "write", refused(errno.ENOSPC))
        with contextlib.suppress(OSError):
            file.write(b"x" * 100_000)
        monkeypatch.undo()
        file.write(b"more")

    with pytest.raises(OSError, match=r"a\.bin") as caught:
        write_atomically(tmp_path / "a.bin", write)
    assert caught.value.errno == errno.ENOSPC
    assert not any(tmp_path.iterdir())


def refused(number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    ("where", "number"),
    [
        ("os.fsync", errno.EIO),
        ("os.replace", errno.EPERM),
        ("pathlib.Path.mkdir", errno.EROFS),
        ("os.dup", errno.EMFILE),
    ],
)
def test_errors_of_each_step_name_the_file(tmp_path, monkeypatch, where, number):
    monkeypatch.setattr(where, refused(number))
    with pytest.raises(OSError, match=r"a\.bin") as caught:
        write_atomically(tmp_path / "a.bin", lambda file: file.write(b"x"))
    assert type(caught.value) is type(OSError(number, ""))
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "a.bin"))
    assert not any(tmp_path.iterdir())


def test_a_name_that_is_too_long_is_an_error_with_the_path(tmp_path):
    path = tmp_path / ("a" * 300)
    with pytest.raises(OSError, match="aaa") as caught:
        write_atomically(path, lambda file: file.write(b"x"))
    assert caught.value.filename == str(path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "gone", "other.png"),
        OSError("cannot write mode F"),
        io.UnsupportedOperation("no"),
    ],
)
def test_errors_of_the_writer_itself_stay_as_they_are(tmp_path, error):
    def write(file):
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(tmp_path / "a.bin", write)
    assert caught.value is error
    assert not any(tmp_path.iterdir())


def write_slowly(path, answer):
    def write(file):
        file.write(b"half")
        file.flush()
        answer.send("writing")
        time.sleep(60)

    write_atomically(path, write)


def write_with_a_child(path, answer):
    def write(file):
        file.write(b"half")
        file.flush()
        child = threading.Thread(target=lambda: start(time.sleep, 60))
        child.start()
        child.join()
        answer.send(multiprocessing.active_children()[0].pid)
        time.sleep(60)

    write_atomically(path, write)


def leftovers(folder):
    return [path.name for path in folder.rglob(".*.part")]


@needs_fork
def test_what_a_killed_writer_left_is_removed_and_that_of_a_live_one_is_not(tmp_path):
    writer, answer = start_answering(write_slowly, tmp_path / "deep" / "a.bin")
    assert answer.recv() == "writing"
    left = leftovers(tmp_path)
    assert len(left) == 1
    remove_leftovers(tmp_path)
    assert leftovers(tmp_path) == left
    kill(writer)
    assert leftovers(tmp_path) == left
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["deep"]


@needs_fork
def test_a_child_of_a_killed_writer_does_not_keep_its_file(tmp_path):
    writer, answer = start_answering(write_with_a_child, tmp_path / "a.bin")
    child = answer.recv()
    remove_leftovers(tmp_path)
    assert len(leftovers(tmp_path)) == 1
    kill(writer)
    try:
        os.kill(child, 0)
        remove_leftovers(tmp_path)
        assert not any(tmp_path.iterdir())
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_file_of_a_writer_in_another_thread_is_not_removed(tmp_path):
    begun, go = threading.Event(), threading.Event()

    def write(file):
        file.write(b"half")
        begun.set()
        assert go.wait(60)

    with ThreadPoolExecutor() as pool:
        writing = pool.submit(write_atomically, tmp_path / "a.bin", write)
        assert begun.wait(60)
        try:
            remove_leftovers(tmp_path)
            assert len(leftovers(tmp_path)) == 1
        finally:
            go.set()
        writing.result()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.skipif(os.name != "posix", reason="needs locks and links")
def test_only_temporary_files_are_removed(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside, inside / "deep"):
        folder.mkdir()
        (folder / ".0123456789abcdef.part").write_bytes(b"half")
    foreign = [".part", ".0123456789ABCDEF.part", ".0123456789abcde.part", ".0123456789abcdef0.part", "a.part", ".lock"]
    foreign += [".0123456789abcdef.part2", "0123456789abcdef.part", ".0123456789abcdef.part\n", ".git", "a.png"]
    for name in foreign:
        (inside / name).write_bytes(b"theirs")
    (inside / ".1111111111111111.part").symlink_to(outside / ".0123456789abcdef.part")
    (inside / ".2222222222222222.part").mkdir()
    os.mkfifo(inside / ".3333333333333333.part")
    (inside / "link").symlink_to(outside)
    (inside / "loop").symlink_to(inside)
    before = {path.name for path in inside.iterdir()}
    remove_leftovers(inside)
    assert before - {path.name for path in inside.iterdir()} == {".0123456789abcdef.part"}
    assert not any((inside / "deep").iterdir())
    assert [path.name for path in outside.iterdir()] == [".0123456789abcdef.part"]
    remove_leftovers(tmp_path / "nowhere")
    remove_leftovers(inside / "a.png")


@pytest.mark.parametrize("function", ["os.open", "pathlib.Path.unlink", "fcntl.flock", "os.lstat", "os.scandir"])
@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOLCK, errno.ESTALE])
def test_leftovers_that_cannot_be_removed_are_left(tmp_path, monkeypatch, function, number):
    (tmp_path / ".0123456789abcdef.part").write_bytes(b"half")
    with monkeypatch.context() as patched:
        patched.setattr(function, refused(number))
        remove_leftovers(tmp_path)
    assert len(leftovers(tmp_path)) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EAGAIN])
def test_writes_without_locks(tmp_path, monkeypatch, number):
    monkeypatch.setattr("fcntl.flock", refused(number))
    write_atomically(tmp_path / "a.txt", lambda file: file.write(b"x"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_writes_where_there_is_no_fcntl(tmp_path, monkeypatch):
    (tmp_path / ".0123456789abcdef.part").write_bytes(b"half")
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr("stseg.storage.folder_lock.fcntl", None)
    write_atomically(tmp_path / "a.txt", lambda file: file.write(b"x"))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", ".0123456789abcdef.part"}


def clean_for_ever(folder):
    while True:
        remove_leftovers(folder)


@needs_fork
def test_writers_are_not_disturbed_by_others_that_clean_up(tmp_path):
    cleaners = [start(clean_for_ever, tmp_path) for _ in range(2)]
    try:
        until = time.monotonic() + 2
        number = 0
        while time.monotonic() < until:
            number += 1
            content = b"%d" % number
            write_atomically(tmp_path / "a.txt", lambda file, content=content: file.write(content))
            assert (tmp_path / "a.txt").read_bytes() == content
        assert all(cleaner.is_alive() for cleaner in cleaners)
    finally:
        for cleaner in cleaners:
            kill(cleaner)
    assert not leftovers(tmp_path)


def test_an_empty_folder_is_refused_and_a_relative_one_stays_where_it_was(tmp_path, monkeypatch):
    data = [(torch.rand(3, 20, 20), torch.randint(2, (20, 20), dtype=torch.uint8)) for _ in range(4)]
    config = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16))
    options = {"num_classes": 2, "config": config, "method": "supervised", "progress": False}
    with pytest.raises(ValueError, match="workdir is an empty string; expected a folder"):
        stseg.SelfTrainer(lambda: nn.Conv2d(3, 2, 1), workdir="", **options)
    with pytest.raises(ValueError, match="workdir is an empty string; expected a folder"):
        stseg.fit(nn.Conv2d(3, 2, 1), data, config, workdir="", progress=False)
    with pytest.raises(ValueError, match="store is an empty string"):
        stseg.MaskStore("")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trainer, store = stseg.SelfTrainer(lambda: nn.Conv2d(3, 2, 1), workdir="run", **options), stseg.MaskStore("masks")
    monkeypatch.chdir(tmp_path / "there")
    trainer.fit(data)
    store.put("a", torch.zeros(3, 4, dtype=torch.uint8))
    assert (tmp_path / "here" / "run" / "run.json").exists()
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"run", "masks"}
    assert not any((tmp_path / "there").iterdir())
