"""Some cases of the fuzzer of work directories, and that it notices what it is there for."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

import pytest

import stseg

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
damage = importlib.import_module("damage")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return damage.prepare(tmp_path_factory.mktemp("runs"), interruptions=8, draw=random.Random(0))


def test_prepares_finished_and_interrupted_runs(sources):
    assert [source.name for source in sources if "finished" in source.name] == [
        *("ST++, finished", "ST, best weights, finished", "fit, finished")
    ]
    states = [source for source in sources if list(source.folder.rglob("latest.pt"))]
    assert len(states) >= 3
    assert len({len(list(source.folder.rglob("*"))) for source in sources}) > 5


FILES = (
    *(
        "run.json",
        "*/stage.json",
        "*/model.safetensors",
        "teacher/snapshots/*",
        "*/progress.json",
        "ranking/ranking.csv",
    ),
    *("ranking/ranking.json", "*/thresholds.json", "*/masks/labels.json", "*/masks/**/*.png"),
    *("*/state/latest.pt", "*/state/best-*.safetensors", "ranking/scores", "ranking/scores.json"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["flip", "truncate", "take another run's", "make a folder", "delete"])
def test_every_kind_of_file_is_made_again_or_named(sources, tmp_path, name, kind):
    fitting = [source for source in sources if any(path.is_file() for path in source.folder.glob(name))]
    assert fitting, "no run has such a file"
    draw = random.Random(f"{name} {kind}")
    done, outcome = damage.try_case(draw.choice(fitting), tmp_path / "case", draw, kind=kind, name=name)
    assert outcome.startswith("identical"), f"{done}: {outcome}"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_what_is_damaged_is_made_again_or_named(sources, tmp_path, number):
    draw = random.Random(number)
    done, outcome = damage.try_case(draw.choice(sources), tmp_path / "case", draw)
    assert outcome.startswith("identical"), f"{done}: {outcome}"


@pytest.mark.slow
@pytest.mark.parametrize("number", range(16))
def test_what_vanishes_during_a_run_is_noticed(sources, tmp_path, number):
    draw = random.Random(number)
    done, outcome = damage.try_vanishing(draw.choice(sources), tmp_path / "case", draw)
    assert outcome in ("identical", "noticed"), f"{done}: {outcome}"


@pytest.mark.parametrize(
    ("finish", "message"),
    [
        (ValueError("no"), "FAILED: ValueError: no"),
        (stseg.DamagedFileError("it is damaged"), "FAILED: AssertionError: no advice: it is damaged"),
        (
            stseg.DamagedFileError("{}/a is damaged; delete {}/a to go on"),
            "FAILED: AssertionError: the advice does not",
        ),
        (stseg.DamagedFileError("a is damaged; delete /nowhere to go on"), "FAILED: AssertionError: /nowhere is outs"),
        ({"model": 2}, "FAILED: another result"),
        ({"model": 1}, "identical"),
    ],
)
def test_failures_are_noticed(tmp_path, finish, message):
    def run(folder):
        if isinstance(finish, Exception):
            raise type(finish)(str(finish).format(folder, folder))
        return finish

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("content")
    source = damage.Source("run", tmp_path / "run", run, {"model": 1}, tmp_path / "run", tmp_path / "run", 0)
    _, outcome = damage.try_case(source, tmp_path / "case", random.Random(0))
    assert outcome.startswith(message)


def test_advice_is_read_from_the_message():
    message = "/a/run.json is damaged; delete /a/run.json, /a/b and /a/c d/e.csv to start over"
    assert damage.advised(message) == [Path("/a/run.json"), Path("/a/b"), Path("/a/c d/e.csv")]
    assert damage.advised("it is damaged") == []
