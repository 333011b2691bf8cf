from __future__ import annotations

import json
import subprocess
import sys

import pytest

import stseg
from stseg.errors import DamagedFileError, WorkdirInUseError, WorkdirMismatchError
from stseg.stages.workdir import Workdir


def test_in_memory_keeps_notes_for_the_run_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdir = Workdir(None, {"a": 1})
    workdir.claim({"labeled": "3 items"})
    workdir.done("teacher", seconds=1.0)
    assert workdir.facts("teacher") == {"seconds": 1.0}
    assert workdir.path("teacher") is None
    assert not list(tmp_path.iterdir())


def test_on_disk_finds_its_notes_again(tmp_path):
    first = Workdir(tmp_path / "run", {"a": (1, 2)})
    first.claim({"labeled": "3 items"})
    first.done("teacher", seconds=1.0)
    second = Workdir(tmp_path / "run", {"a": (1, 2)})
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
    with pytest.raises(WorkdirInUseError, match="run is in use by another process"):
        workdir.claim({"labeled": "3 items"})
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    other.kill()  # what it held is free at once
    other.wait()
    workdir.claim({})
    workdir.done("teacher", seconds=1.0)


def test_one_process_may_take_its_folder_up_again_at_any_time(tmp_path):
    first = Workdir(tmp_path / "run", {})
    first.claim({})
    second = Workdir(tmp_path / "run", {})  # as after an error, when the first one still hangs in a traceback
    second.claim({})
    second.done("teacher", seconds=1.0)
    assert first.folder == second.folder
