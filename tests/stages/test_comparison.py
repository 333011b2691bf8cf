"""The comparison of runs: one page, from their work directories alone."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from report_page import Page
from torch import nn

import stseg
from stseg.methods import Labeling, STPlusPlus
from stseg.stages.comparison import _line
from stseg.stages.summary import SINGLE, TrainingSummary, read_run
from stseg.storage.records import read_record, write_record

CONFIG = stseg.TrainConfig(steps=4, batch_size=2, weak=stseg.WeakAugment(16), eval_every=2)
LIST = "Runs, their final mIoU and numbers of images"
SETTINGS = "Settings that are not the same in all runs"


def pairs(count, seed=0):
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return [(image, (image[0] > 0.5).byte()) for image in images]


def run(folder, *, method=None, lr=0.001, val=True, **options):
    method = STPlusPlus(labeling=Labeling(tta=None)) if method is None else method
    config = dataclasses.replace(CONFIG, lr=lr)
    options = {"num_classes": 2, "config": config, "progress": False, **options}
    trainer = stseg.SelfTrainer(lambda: nn.Conv2d(3, 2, 1), method=method, workdir=folder, **options)
    return trainer.fit(pairs(2), [image for image, _ in pairs(4, seed=1)], pairs(2, seed=2) if val else None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results by folder: ST++, the supervised baseline with two learning rates, and a training by fit."""
    folder = tmp_path_factory.mktemp("runs")
    results = {
        folder / "a": run(folder / "a", class_names=["sky", "<sun>"]),
        folder / "b": run(folder / "b", method="supervised"),
        folder / "c": run(folder / "c", method="supervised", lr=0.01),
    }
    torch.manual_seed(0)
    options = {"val": pairs(2, seed=2), "workdir": folder / "d", "progress": False}
    results[folder / "d"] = stseg.fit(nn.Conv2d(3, 2, 1), pairs(2), CONFIG, **options)
    return results


def test_a_row_for_each_run_with_its_final_score(runs, tmp_path):
    page = Page(stseg.compare_runs(list(runs), tmp_path / "new" / "comparison.html"))
    rows = page.tables[LIST]
    assert [row[0] for row in rows] == ["Run", "a", "b", "c", "d"]
    for row, result in zip(rows[1:], runs.values(), strict=True):
        last = result if isinstance(result, stseg.FitResult) else list(result.stages.values())[-1]
        assert row[1] == f"{100 * last.history[-1]['miou']:.1f} %"
    assert [row[2] for row in rows[1:]] == ["ST++", "supervised", "supervised", "Supervised"]
    assert [row[3:6] for row in rows[1:]] == [["2", "4", "2"]] * 3 + [["2", "–", "2"]]
    assert {row[7] for row in rows[1:]} == {"finished"}
    assert sum(" over step of all trainings" in label for label in page.labels) == 2
    assert "Before comparing" not in page.text


def test_settings_that_differ_and_no_others(runs, tmp_path):
    folders = [folder for folder in runs if folder.name in "bc"]
    rows = Page(stseg.compare_runs(folders, tmp_path / "c.html")).tables[SETTINGS]
    assert rows == [["Setting", "b", "c"], ["config.lr", "0.001", "0.01"]]
    settings = dict(
        map(tuple, (row[:2] for row in Page(stseg.compare_runs(runs, tmp_path / "c.html")).tables[SETTINGS]))
    )
    assert settings["method.type"] == "STPlusPlus"
    assert "config.steps" not in settings


def test_iou_by_class(runs, tmp_path):
    folder = shutil.copytree(next(iter(runs)), tmp_path / "with iou")
    for step in ("teacher", "student-1", "student-2"):
        record = read_record(folder / step / "progress.json")
        for row in record["history"]:
            row |= {"iou/0": 0.5, "iou/1": None}
        write_record(folder / step / "progress.json", record)
    other = list(runs)[1]
    last = list(runs[other].stages.values())[-1].history[-1]
    page = Page(stseg.compare_runs([folder, other], tmp_path / "c.html"))
    assert page.tables["IoU of each class on the validation images"] == [
        ["Class", "with iou", "b"],
        ["sky", "50.0 %", f"{100 * last['iou/0']:.1f} %"],
        ["<sun>", "–", f"{100 * last['iou/1']:.1f} %"],
    ]


def test_a_run_under_way(runs, tmp_path):
    folder = shutil.copytree(next(iter(runs)), tmp_path / "run")
    record = read_record(folder / "run.json")
    del record["finished"], record["steps"]["student-2"]
    write_record(folder / "run.json", record)
    for name in ("student-2/model.safetensors", "student-2/progress.json", "report.html"):
        (folder / name).unlink()
    history = (folder / "student-2" / "history.jsonl").read_text().splitlines(keepends=True)
    (folder / "student-2" / "history.jsonl").write_text(history[0])
    page = Page(stseg.compare_runs([folder, *runs], tmp_path / "c.html"))
    assert page.tables[LIST][1][7] == "under way: student-2"
    shutil.rmtree(folder / "student-2")
    shutil.rmtree(folder / "teacher")
    shutil.rmtree(folder / "student-1")
    write_record(folder / "run.json", {**record, "steps": {"check": {"skipped": []}}})
    page = Page(stseg.compare_runs([folder, *runs], tmp_path / "c.html"))
    assert page.tables[LIST][1][1] == "–"
    assert page.tables[LIST][1][7] == "under way: begun"


def test_curves_go_on_over_all_trainings(runs):
    told = read_run(next(iter(runs)))
    across, up = _line(told, "miou")
    assert across == [2, 4, 4, 6, 8, 8, 10, 12, 12]
    history = [row for stage in runs[told.folder].stages.values() for row in stage.history]
    assert [value for value in up if value == value] == [100 * row["miou"] for row in history]
    assert [place for place, value in enumerate(up) if value != value] == [2, 5, 8]
    empty = dataclasses.replace(told, trainings={SINGLE: TrainingSummary((), {}, {}, ())})
    assert _line(empty, "loss") == ([], [])


def test_scores_on_other_images_are_pointed_at(runs, tmp_path):
    stseg.fit(nn.Conv2d(3, 2, 1), pairs(2), CONFIG, val=pairs(2, seed=5), workdir=tmp_path / "x", progress=False)
    text = Page(stseg.compare_runs([*runs, tmp_path / "x"], tmp_path / "c.html")).text
    assert "They were validated on different images or masks: a, b, c, d; x." in text
    assert "They learned" not in text
    run(tmp_path / "best", method="supervised", keep="best")
    text = Page(stseg.compare_runs([*runs, tmp_path / "best"], tmp_path / "c.html")).text
    assert "The validation images chose the weights of best," in text
    run(tmp_path / "unmeasured", method="supervised", val=False)
    assert "validated" not in Page(stseg.compare_runs([*runs, tmp_path / "unmeasured"], tmp_path / "c.html")).text


def test_runs_of_one_name_are_told_apart(runs, tmp_path):
    first = next(iter(runs))
    for parent in ("<x>", "y"):
        shutil.copytree(first, tmp_path / parent / "run")
    page = Page(stseg.compare_runs([tmp_path / "<x>" / "run", str(tmp_path / "y" / "run")], tmp_path / "c.html"))
    assert [row[0] for row in page.tables[LIST]] == ["Run", "<x>/run", "y/run"]
    assert "Comparison of a" in Page(stseg.compare_runs([first], tmp_path / "c.html")).text


def test_a_folder_that_is_no_run_is_named(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for folder, error, message in (
        (tmp_path / "empty", stseg.DataError, "empty is not a work directory: it has neither run.json nor stage.json"),
        (tmp_path / "none", stseg.DataError, "none does not exist"),
        (tmp_path / "file", NotADirectoryError, "file is a file; expected a folder"),
        (next(iter(runs)).parent, stseg.DataError, "expected one of the runs in it: 'a', 'b', 'c', 'd'"),
    ):
        with pytest.raises(error, match=message):
            stseg.compare_runs([*runs, folder], tmp_path / "c.html")
    assert not (tmp_path / "c.html").exists()


@pytest.mark.parametrize(
    ("folders", "out", "error", "message"),
    [
        ("runs/a", "c.html", TypeError, r"folders is 'runs/a'; expected a list of folders: \['runs/a', ...\]"),
        ([], "c.html", ValueError, "folders is empty; expected the work directories"),
        (["runs/a"], "runs", ValueError, r"out is 'runs'; expected a file that ends in \.html"),
        (["runs/a", "runs/../runs/a"], "c.html", ValueError, "is given twice; expected each run once"),
    ],
)
def test_wrong_arguments(folders, out, error, message):
    with pytest.raises(error, match=message):
        stseg.compare_runs(folders, out)


def test_without_matplotlib_there_are_tables(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    page = Page(stseg.compare_runs(runs, tmp_path / "c.html"))
    assert "pip install stseg[report]" in page.text
    assert LIST in page.tables
