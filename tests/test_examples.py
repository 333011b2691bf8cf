"""The examples, on tiny settings."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import stseg
from stseg.data import SyntheticScenes

ROOT = Path(__file__).parents[1]
CAMVID = Path(os.environ.get("STSEG_CAMVID", ROOT.parent / "shared" / "camvid"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_main(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


def test_quickstart_prints_a_table_and_draws_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("quickstart")
    monkeypatch.setattr(module, "LABELED", 3)
    monkeypatch.setattr(module, "UNLABELED", 8)
    monkeypatch.setattr(module, "HELD_OUT", 6)
    run_main(module, monkeypatch, "--out", str(tmp_path), "--steps", "3")
    table = capsys.readouterr().out
    for word in ("mIoU", "supervised", "ST", "ST++", *SyntheticScenes.classes, "student-2"):
        assert word in table
    picture = np.asarray(Image.open(tmp_path / "demo.png").convert("RGB"))
    assert picture.shape[0] > 500
    assert picture.std() > 10
    # The second run finds everything done, and says the same of the networks.
    run_main(module, monkeypatch, "--out", str(tmp_path), "--steps", "3")
    again = capsys.readouterr().out
    assert again.split("\n")[:4] == table.split("\n")[:4]


def test_own_loop_trains_and_compares(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = load("own_loop")
    monkeypatch.setattr(module, "STEPS", 3)
    for name, value in {"BATCH": 2, "SIZE": 32, "LABELED": 3, "UNLABELED": 6, "HELD_OUT": 4}.items():
        monkeypatch.setattr(module, name, value)
    with torch.random.fork_rng():
        module.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["supervised", "ST++"]
    assert sum(line.startswith("step") for line in lines) == 9


def test_own_loop_is_a_page() -> None:
    assert len((ROOT / "examples" / "own_loop.py").read_text().splitlines()) < 80


def check_camvid_run(out: Path, unlabeled: set[str]) -> None:
    done = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"run.json", "teacher/model.safetensors", "teacher/history.jsonl", "ranking/ranking.csv"} <= done
    labeled = {path.stem for step in ("reliable", "unreliable") for path in (out / step / "masks").glob("*.png")}
    assert labeled == unlabeled
    assert set(stseg.Ranking.from_csv(out / "ranking" / "ranking.csv").ids) == unlabeled
    assert "report.html" in done
    assert any(name.startswith("figures/") for name in done)


def test_camvid_example_on_a_folder_of_its_layout(
    camvid_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", str(camvid_like), "--out", str(tmp_path / "run"), "--steps", "3", "--height", "24")
    run_main(load("camvid"), monkeypatch, *arguments, "--arch", "FPN", "--encoder", "tu-test_resnet")
    assert "student-2: mIoU" in capsys.readouterr().out
    check_camvid_run(tmp_path / "run", {f"{i:03d}" for i in range(2, 8)})


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID} (set STSEG_CAMVID)")
def test_camvid_example_on_camvid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "camvid"
    ids = (CAMVID / "splits" / "1_8" / "seed_0" / "unlabeled.txt").read_text().split()
    chosen = {"train": ids[:5], "val": sorted(path.stem for path in (CAMVID / "val" / "images").iterdir())[:2]}
    for part, stems in chosen.items():
        for kind, suffix in (("images", ".jpg"), ("masks", ".png")):
            (data / part / kind).mkdir(parents=True)
            for stem in stems:
                (data / part / kind / f"{stem}{suffix}").symlink_to(CAMVID / part / kind / f"{stem}{suffix}")
    split = data / "splits" / "few"
    split.mkdir(parents=True)
    (split / "labeled.txt").write_text("\n".join(ids[:3]))
    (split / "unlabeled.txt").write_text("\n".join(ids[3:5]))
    run = ("--data", str(data), "--split", "few", "--out", str(tmp_path / "run"), "--steps", "3", "--height", "48")
    run_main(load("camvid"), monkeypatch, *run, "--arch", "FPN", "--encoder", "tu-test_resnet")
    assert "student-2: mIoU" in capsys.readouterr().out
    check_camvid_run(tmp_path / "run", set(ids[3:5]))
