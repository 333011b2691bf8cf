from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import stseg
from stseg.errors import DamagedFileError, WorkdirInUseError, WorkdirMismatchError
from stseg.stages.workdir import Workdir
from stseg.storage.records import read_record


def test_in_memory_keeps_notes_for_the_run_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = Workdir(None, {"a": 1})
    workdir.claim({"labeled": "3 items"})
    workdir.done("teacher", seconds=1.0)
    assert workdir.facts("teacher") == {"seconds": 1.0}
    assert workdir.path("teacher") is None
    assert not list(tmp_path.iterdir())


def test_on_disk_finds_its_notes_again(tmp_path):
    with Workdir(tmp_path / "run", {"a": (1, 2)}) as first:
        first.claim({"labeled": "3 items"})
        first.done("teacher", seconds=1.0)
    with Workdir(tmp_path / "run", {"a": (1, 2)}) as second:
        second.claim({"labeled": "3 items"})
    assert second.facts("teacher") == {"seconds": 1.0}
    assert second.facts("ranking") is None
    assert second.path("ranking", "ranking.csv") == tmp_path / "run" / "ranking" / "ranking.csv"


def test_keeps_the_notes_of_the_first_time(tmp_path):
    workdir = Workdir(tmp_path, {})
    workdir.claim({})
    workdir.done("teacher", seconds=9.0)
    workdir.done("teacher", seconds=0.1)
    assert workdir.facts("teacher") == {"seconds": 9.0}


def test_writes_nothing_before_the_data_have_been_looked_at(tmp_path):
    Workdir(tmp_path / "run", {"a": 1})
    assert not (tmp_path / "run").exists()


def test_names_versions(tmp_path):
    Workdir(tmp_path, {"a": 1}).claim({})
    versions = json.loads((tmp_path / "run.json").read_text())["versions"]
    assert versions["stseg"] == stseg.__version__
    assert {"python", "torch", "kornia", "timm"} <= versions.keys()


def test_of_other_settings_or_data_is_refused(tmp_path):
    Workdir(tmp_path, {"a": 1}).claim({"labeled": "3 items, 00"})
    with pytest.raises(WorkdirMismatchError, match="a is 1 there and 2 now"):
        Workdir(tmp_path, {"a": 2})
    with pytest.raises(WorkdirMismatchError, match="labeled is '3 items, 00' there and '4 items, 11' now"):
        Workdir(tmp_path, {"a": 1}).claim({"labeled": "4 items, 11"})


def test_that_holds_files_of_others_is_not_advised_to_be_deleted(tmp_path):
    with Workdir(tmp_path, {"a": 1}) as workdir:
        workdir.claim({})
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "stage.json").touch()
    with pytest.raises(WorkdirMismatchError, match=f"or delete {tmp_path} to start over"):
        Workdir(tmp_path, {"a": 2})
    (tmp_path / "images").mkdir()
    message = f"or delete {tmp_path}/run.json and {tmp_path}/teacher to start over"
    with pytest.raises(WorkdirMismatchError, match=message):
        Workdir(tmp_path, {"a": 2})


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"settings": 3}', '{"settings": {}}'])
def test_with_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"run\.json is damaged.*; delete .*run\.json to write it again"):
        Workdir(tmp_path, {})


def test_a_folder_in_which_another_process_works_is_refused(tmp_path):
    program = (
        "import sys; from stseg.stages.workdir import Workdir\n"
        f"workdir = Workdir({str(tmp_path / 'run')!r}, {{}}); workdir.claim({{}})\n"
        "print('claimed', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "claimed\n"
    before = (tmp_path / "run" / "run.json").read_bytes()
    workdir = Workdir(tmp_path / "run", {})
    with pytest.raises(WorkdirInUseError, match=f"run is in use by process {other.pid} on "):
        workdir.claim({"labeled": "3 items"})
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    other.kill()  # what it held is free at once
    other.wait()
    workdir.claim({})
    workdir.done("teacher", seconds=1.0)


def test_one_process_may_take_its_folder_up_again_after_an_error(tmp_path):
    def interrupted():
        with Workdir(tmp_path / "run", {}) as first:
            first.claim({})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    assert caught.value.__traceback__  # in which the first one still hangs, as in a notebook
    with Workdir(tmp_path / "run", {}) as second:
        second.claim({})
        second.done("teacher", seconds=1.0)


def test_two_runs_in_one_process_are_kept_apart(tmp_path):
    with Workdir(tmp_path / "run", {}) as first, Workdir(tmp_path / "run", {}) as second:
        first.claim({})
        with pytest.raises(WorkdirInUseError, match="run is in use by process"):
            second.claim({})
        del second
        gc.collect()
        with Workdir(tmp_path / "run", {}) as third, pytest.raises(WorkdirInUseError):
            third.claim({})
        first.done("teacher", seconds=1.0)


def test_what_another_run_wrote_before_it_died_is_read_again_under_the_lock(tmp_path):
    with Workdir(tmp_path / "run", {"a": 1}) as second:  # before there is anything
        with Workdir(tmp_path / "run", {"a": 2}) as first:
            first.claim({})
            first.done("teacher", seconds=1.0)
        with pytest.raises(WorkdirMismatchError, match="a is 2 there and 1 now"):
            second.claim({})
    assert read_record(tmp_path / "run" / "run.json")["settings"] == {"a": 2}
    with Workdir(tmp_path / "run", {"a": 2}) as again, Workdir(tmp_path / "run", {"a": 2}) as other:
        other.claim({})
        other.done("ranking", seconds=2.0)
        other.__exit__()
        again.claim({})
        assert again.facts("ranking") == {"seconds": 2.0}


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "run" / "teacher").mkdir(parents=True)
    (tmp_path / "run" / "teacher" / ".0123456789abcdef.part").write_bytes(b"half")
    with Workdir(tmp_path / "run", {}) as workdir:
        workdir.claim({})
    assert not list(tmp_path.rglob("*.part"))


def test_nothing_is_written_into_a_folder_in_which_all_is_done(tmp_path):
    for _ in range(2):
        with Workdir(tmp_path, {"a": (1,)}) as workdir:
            workdir.claim({"labeled": "3 items"})
            workdir.done("teacher", seconds=1.0)
            (tmp_path / "report.html").touch()
            if (tmp_path / "before").exists():
                assert workdir.is_finished
                assert (tmp_path / "run.json").stat().st_mtime_ns == int((tmp_path / "before").read_text())
            (tmp_path / "before").write_text(str((tmp_path / "run.json").stat().st_mtime_ns))


READ_ONLY = """
import encodings.utf_8_sig, os, sys, torch, stseg
from pathlib import Path
from torch import nn

folder = Path(sys.argv[1])
generator = torch.Generator().manual_seed(0)
images = torch.rand(8, 3, 12, 12, generator=generator)
pairs = [(image, (image[0] > 0.5).byte()) for image in images[:3]]
config = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(12))

def run():
    options = {"num_classes": 2, "config": config, "progress": False}
    trainer = stseg.SelfTrainer(lambda: nn.Conv2d(3, 2, 1), workdir=folder / "run", **options)
    result = trainer.fit(pairs, list(images[3:]))
    torch.manual_seed(0)
    single = stseg.fit(nn.Conv2d(3, 2, 1), pairs, config, snapshots=[1], workdir=folder / "fit", progress=False)
    labels = stseg.PseudoLabeler(single.model, num_classes=2, progress=False).label(list(images[3:]), folder / "masks")
    masks = [mask for found in (*result.labels.values(), labels) for _, mask in found]
    return [*result.model.state_dict().values(), *single.model.state_dict().values(), *masks]

before = run()
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
else:
    for path in (folder, *folder.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
try:
    (folder / "run" / "file").touch()
except PermissionError:
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert all(torch.equal(one, other) for one, other in zip(before, run(), strict=True))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files
    (folder / "run" / "report.html").exists() and print("same")
    config = stseg.TrainConfig(steps=4, batch_size=2, weak=stseg.WeakAugment(12))
    try:
        stseg.fit(nn.Conv2d(3, 2, 1), pairs, config, workdir=folder / "new", progress=False)
    except PermissionError as error:
        print("refused" if str(folder / "new") in str(error) else error)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs permissions of files")
def test_opening_a_finished_run_needs_no_write_access(tmp_path_factory):
    folder = Path(tempfile.mkdtemp())
    try:
        folder.chmod(0o755)
        command = [sys.executable, "-c", READ_ONLY, str(folder)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(tmp_path_factory.mktemp("mpl"))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["same", "refused"]
    finally:
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(folder)


FULL = """
import resource, sys, torch, stseg
from pathlib import Path
from torch import nn

folder, most = Path(sys.argv[1]), int(sys.argv[2])
generator = torch.Generator().manual_seed(0)
images = torch.rand(6, 3, 12, 12, generator=generator)
pairs = [(image, (image[0] > 0.5).byte()) for image in images[:3]]
config = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(12), save_every=0)
network = lambda: nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 2, 1))
if most:  # every file ends at so many bytes, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
try:
    options = {"num_classes": 2, "config": config, "progress": False, "method": "st"}
    result = stseg.SelfTrainer(network, workdir=folder, **options).fit(pairs, list(images[3:]))
except OSError as error:
    assert type(error) is OSError and error.filename and error.filename.startswith(str(folder)), error
    print("full", Path(error.filename).name)
else:
    print("done", sum(float(value.double().sum()) for value in result.model.state_dict().values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs limits of file sizes")
def test_a_full_disk_names_the_file_and_the_run_goes_on_when_there_is_room(tmp_path):
    def run(folder, most):
        command = [sys.executable, "-c", FULL, str(folder), str(most)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    expected = run(tmp_path / "whole", 0)
    named = [run(tmp_path / "full", most) for most in (100, 3000, 12_000)]
    assert [first for first, *_ in named] == ["full"] * 3
    assert [name for _, name in named] == ["run.json", "1.safetensors", "latest.pt"]
    assert not list((tmp_path / "full").rglob("*.part"))
    assert run(tmp_path / "full", 0) == expected
