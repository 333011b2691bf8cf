from __future__ import annotations

import itertools
import multiprocessing
import os
import stat
import time

import pytest
import torch
from torch import nn

import stseg
from stseg.storage.files import write_atomically


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
    with pytest.raises(OSError, match=r"a\.txt"):
        write_atomically(tmp_path / "a.txt", lambda file: file.write(b"new"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


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


def test_an_empty_folder_is_refused_and_a_relative_one_stays_where_it_was(tmp_path, monkeypatch):
    data = [(torch.rand(3, 20, 20), torch.randint(2, (20, 20), dtype=torch.uint8)) for _ in range(4)]
    config = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16))
    options = {"num_classes": 2, "config": config, "method": "supervised", "progress": False}
    with pytest.raises(ValueError, match="workdir is an empty string; expected a folder"):
        stseg.SelfTrainer(lambda: nn.Conv2d(3, 2, 1), workdir="", **options)
    with pytest.raises(ValueError, match="workdir is an empty string; expected a folder"):
        stseg.fit(nn.Conv2d(3, 2, 1), data, config, workdir="", progress=False)
    with pytest.raises(ValueError, match="the store is an empty string"):
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
