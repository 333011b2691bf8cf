"""The examples, on tiny settings."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import stseg
from stseg.data import SyntheticScenes

EXAMPLES = Path(__file__).parents[1] / "examples"
SMALL = {"SIZE": 32, "LABELED": 3, "UNLABELED": 6, "HELD_OUT": 4, "STEPS": 3}
COMPARISONS = {
    "st": ("supervised", "ST"),
    "st_plus_plus": ("supervised", "ST++"),
    "own_method": ("supervised", "entropy minimization"),
    "own_loop": ("supervised", "ST++"),
    "fixmatch": ("supervised", "FixMatch"),
    "mean_teacher": ("supervised", "Mean Teacher"),
    "unimatch": ("supervised", "UniMatch"),
    "cps": ("supervised", "CPS"),
    "adv_ssl": ("supervised", "AdvSSL"),
    "cutmix_seg": ("supervised", "CutMix-Seg"),
    "class_mix": ("supervised", "ClassMix"),
    "unimatch_v2": ("supervised", "UniMatch V2"),
    "s4l": ("supervised", "S4L"),
    "s4gan": ("supervised", "S4GAN", "with MLMT"),
    "ecs": ("supervised", "ECS"),
    "gct": ("supervised", "GCT"),
    "cct": ("supervised", "CCT"),
    "dcc": ("supervised", "DCC"),
    "u2pl": ("supervised", "U2PL"),
}
TELLS_TWO_CLASSES_BY_ONE_LOGIT = stseg.Segmenter(torch.nn.Conv2d(3, 1, 1))(torch.rand(1, 3, 4, 4)).shape[1] == 2


def load(path: Path) -> ModuleType:
    """Import a script; what lies beside it can be imported from it, as where it is run."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def small(name: str, monkeypatch: pytest.MonkeyPatch, **constants: object) -> ModuleType:
    module = load(EXAMPLES / f"{name}.py")
    for constant, value in {**SMALL, **constants}.items():
        monkeypatch.setattr(module, constant, value)
    return module


def run_main(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    with torch.random.fork_rng():
        module.main()


def test_every_example_is_tested() -> None:
    tested = {*COMPARISONS, "quickstart", "plots", "supervised", "binary"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize("name", COMPARISONS)
def test_an_example_compares_supervised_training_with_its_method(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_main(small(name, monkeypatch), monkeypatch)
    lines = [line.split(" mIoU ") for line in capsys.readouterr().out.splitlines() if " mIoU " in line]
    assert tuple(title.strip() for title, _ in lines) == COMPARISONS[name]
    assert all(0 <= float(value) <= 100 for _, value in lines)


def test_s4gan_removes_the_classes_that_its_classifier_does_not_see() -> None:
    module = load(EXAMPLES / "s4gan.py")
    segmenter, classifier = torch.nn.Conv2d(3, 3, 1), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    torch.nn.init.zeros_(classifier[1].weight)
    classifier[1].bias.data = torch.tensor([-9.0, 9.0, -9.0])
    assert (module.Fused(segmenter, classifier)(torch.rand(2, 3, 4, 4)).argmax(1) == 1).all()


def test_supervised_prints_the_classes_for_few_and_for_all_masks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_main(small("supervised", monkeypatch), monkeypatch)
    head, few, every = capsys.readouterr().out.splitlines()
    assert head.split() == ["mIoU", *SyntheticScenes.classes]
    assert [line[:9] for line in (few, every)] == ["few masks", "all masks"]
    assert len(few[9:].split()) == len(every[9:].split()) == 8


@pytest.mark.skipif(not TELLS_TWO_CLASSES_BY_ONE_LOGIT, reason="one logit is not two classes yet")
def test_binary_trains_a_network_with_one_logit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = small("binary", monkeypatch)
    assert next(module.make_network().segmentation_head.parameters()).shape[0] == 1
    run_main(module, monkeypatch)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["supervised", "ST"]
    assert all("IoU of the foreground" in line for line in lines)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_a_page(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < (130 if path.stem == "quickstart" else 90)
    assert path.stem == "plots" or f"python examples/{path.stem}.py" in text


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell of a notebook; return the value of its last line, which a notebook shows."""
    *body, last = ast.parse(source).body
    is_shown = isinstance(last, ast.Expr)
    exec(compile(ast.Module(body if is_shown else [*body, last], []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


def test_the_notebook_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((EXAMPLES / "first_run.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    small: dict[str, int] = {**SMALL, "LABELED": 4}
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    with torch.random.fork_rng():
        for cell in cells:
            constant = re.compile(r"^([A-Z_]+) = \d+$", re.M)
            source = constant.sub(lambda found: f"{found[1]} = {small[found[1]]}", "".join(cell["source"]))
            shown.append(run_cell(source, names))
    assert sum(isinstance(each, Figure) for each in shown) == 4
    assert names["STEPS"] == SMALL["STEPS"]
    scores = [float(line.split(" mIoU ")[1]) for line in capsys.readouterr().out.splitlines() if " mIoU " in line]
    assert len(scores) == 2


def test_quickstart_prints_a_table_and_draws_a_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load(EXAMPLES / "quickstart.py")
    for name, value in {"LABELED": 3, "UNLABELED": 8, "HELD_OUT": 6}.items():
        monkeypatch.setattr(module, name, value)
    run_main(module, monkeypatch, "--out", str(tmp_path), "--steps", "3")
    table = capsys.readouterr().out
    for word in ("mIoU", "supervised", "FixMatch", "ST++", *SyntheticScenes.classes, "student-2"):
        assert word in table
    picture = np.asarray(Image.open(tmp_path / "demo.png").convert("RGB"))
    assert picture.shape[0] > 500
    assert picture.std() > 10
    # The second run finds everything done, and prints the same figures.
    run_main(module, monkeypatch, "--out", str(tmp_path), "--steps", "3")
    again = capsys.readouterr().out
    assert again.split("\n")[:4] == table.split("\n")[:4]
