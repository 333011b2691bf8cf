"""The benchmark of learning: it covers all methods, wrong targets change what is learned, and it resumes."""

from __future__ import annotations

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import stseg
from stseg import methods
from stseg.data import SyntheticScenes

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import learning


def test_covers_every_method() -> None:
    public = {name: getattr(methods, name) for name in methods.__all__}
    trainings = {name for name, kind in public.items() if isinstance(kind, type) and issubclass(kind, stseg.Method)}
    with torch.device("meta"):
        covered = {type(make()).__name__ for make in learning.METHODS.values()}
    assert covered == trainings - {"Supervised"}
    assert learning.WRONG.keys() == learning.METHODS.keys()


@pytest.mark.parametrize("name", learning.METHODS)
def test_wrong_targets_change_the_loss(name: str) -> None:
    torch.manual_seed(0)
    method = learning.METHODS[name]().train()
    size, weak = learning.SIZE, stseg.WeakAugment(learning.SIZE)
    scenes = [SyntheticScenes(2, size=size)[i] for i in range(2)]
    views = [method.view(image / 255, weak)[0] for image, _ in scenes]
    batch = stseg.Batch(
        images=torch.stack([image / 255 for image, _ in scenes]),
        masks=torch.stack([mask.long() for _, mask in scenes]),
        is_pseudo=torch.zeros(2, dtype=torch.bool),
        unlabeled=torch.utils.data.default_collate(views),
        step=5,
        steps=10,
    )
    for setting in ("threshold", "confident"):  # a network of random weights is sure of nothing
        if hasattr(method, setting):
            setattr(method, setting, 0.0)
    totals = []
    for wrong in (False, False, True):
        torch.manual_seed(1)
        with learning.with_wrong_targets(name) if wrong else nullcontext():
            totals.append(float(copy.deepcopy(method)(batch).total.detach()))
    assert totals[0] == totals[1]
    assert totals[0] != totals[2]


def test_is_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--out", str(tmp_path), "--steps", "1", "--seeds", "0", "--methods", "S4L"]
    learning.main(arguments)
    printed = capsys.readouterr().out
    assert "| S4L |" in printed
    with monkeypatch.context() as patch:
        patch.setattr(stseg, "fit", None)
        learning.main(arguments)
    assert capsys.readouterr().out == printed


def test_table_compares_with_supervised_of_the_same_seed() -> None:
    found = {
        "supervised": {0: 30.0, 1: 40.0},
        "FixMatch": {0: 35.0, 1: 39.0},
        "FixMatch, wrong": {0: 20.0},
    }
    lines = learning.table(found).splitlines()
    assert lines[2] == "| supervised | 35.0 | | | | |"
    assert lines[3] == "| FixMatch | 37.0 | +2.0 | 1 of 2 | 20.0 | 1 of 1 |"
