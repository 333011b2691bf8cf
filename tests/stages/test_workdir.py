from __future__ import annotations

import gc
import json
import subprocess
import sys

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


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"settings": 3}', '{"settings": {}}'])
def test_with_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"run\.json is damaged.*; delete .*run\.json to write it anew"):
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
