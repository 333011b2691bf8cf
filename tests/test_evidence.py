"""The evidence runner: what it trains, measures, writes and takes up again."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from safetensors.torch import load_file

import stseg

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import evidence
import evidence_data
import evidence_tables
from evidence_tables import Result

CLASSES = ("ground", "sky", "road", "building", "tree", "person", "car")


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    flags = f"--data {data} --out {out} --seeds 0 --steps 3 --batch-size 2 --size 48 64 --crop 32 40 --fp32"
    return [*flags.split(), "--arch", "FPN", "--encoder", "tu-test_resnet", "--classes", *CLASSES, *more]


def rows(out: Path) -> dict[tuple[str, str, int], dict[str, str]]:
    with open(out / "results.csv", newline="") as file:
        return {(row["method"], row["fraction"], int(row["seed"])): row for row in csv.DictReader(file)}


def naive_iou(folder: Path, args: list[str], data: Path) -> list[float]:
    """IoU of each class on val, of the weights in a stage's folder: loops over images and classes."""
    network = evidence.network_of(evidence.parse(args))
    network.load_state_dict(load_file(folder / "model.safetensors"))
    model = stseg.Segmenter(network).eval()
    common, union = np.zeros(len(CLASSES)), np.zeros(len(CLASSES))
    for path in sorted((data / "val" / "images").iterdir()):
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        mask = np.array(Image.open(data / "val" / "masks" / path.name))
        with torch.no_grad():
            guess = model(image[None])[0].argmax(0).numpy()
        for k in range(len(CLASSES)):
            common[k] += ((mask == k) & (guess == k)).sum()
            union[k] += ((mask == k) | (guess == k)).sum()
    return [float(c / u) if u else float("nan") for c, u in zip(common, union, strict=True)]


def test_runs_methods_and_measures_their_networks(
    camvid_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    args = arguments(camvid_like, out, "--fractions", "1_8", "1/2", "--methods", "supervised", "st", "st++")
    evidence.main(args)
    printed = capsys.readouterr().out
    found = rows(out)
    assert list(found) == [(m, f, 0) for f in ("1/2", "1/8") for m in ("supervised", "st", "st++")]
    for (method, fraction, _), row in found.items():
        stage = {"supervised": "teacher", "st": "student", "st++": "student-2"}[method]
        folder = out / fraction.replace("/", "_") / "seed_0" / method / stage
        expected = naive_iou(folder, args, camvid_like)
        assert float(row["miou"]) == pytest.approx(np.nanmean(expected), abs=1e-9)
        assert [float(row[f"iou {name}"]) for name in CLASSES] == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert f"{100 * float(row['miou']):.1f}" in printed
    # the split of the file, and one drawn where there is no file
    assert (found["st", "1/8", 0]["labelled"], found["st", "1/8", 0]["unlabelled"]) == ("2", "6")
    assert (found["st", "1/2", 0]["labelled"], found["st", "1/2", 0]["unlabelled"]) == ("4", "4")
    for name in ("methods.png", "classes.png"):
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5

    # Done is done: nothing is trained again, and the table is the same.
    table = (out / "results.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(stseg, "SelfTrainer", None)
        evidence.main(args)
    assert (out / "results.md").read_text() == table
    # One result is lost: it is measured again on the networks that are there.
    (out / "1_8" / "seed_0" / "st" / "result.json").unlink()
    evidence.main(args)
    assert rows(out)["st", "1/8", 0]["miou"] == found["st", "1/8", 0]["miou"]
    with pytest.raises(stseg.WorkdirMismatchError, match="steps is 3 there and 4 now"):
        evidence.main([*args, "--steps", "4"])


@pytest.mark.slow
def test_every_method_runs_and_no_mask_of_an_unlabelled_image_is_learnt(camvid_like: Path, tmp_path: Path) -> None:
    methods = [name for name in evidence.METHODS if name not in ("ceiling", "st-true")]
    weights = []
    for out, chosen in ((tmp_path / "true", methods), (tmp_path / "other", ["supervised", "st", "st++"])):
        evidence.main(arguments(camvid_like, out, "--methods", *chosen))
        files = sorted(path.relative_to(out) for path in out.rglob("model.safetensors"))
        weights.append({path: load_file(out / path) for path in files})
        for id in (camvid_like / "splits" / "1_8" / "seed_0" / "unlabeled.txt").read_text().split():
            path = camvid_like / "train" / "masks" / f"{id}.png"
            Image.fromarray((np.asarray(Image.open(path)) + 1) % len(CLASSES)).save(path)
    assert [len(found) for found in weights] == [len(methods) + 2, 4]  # ST++ has two students
    for path, tensors in weights[1].items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(weights[0][path][name], tensor, rtol=0, atol=0)
    st = [rows(tmp_path / out)["st", "1/8", 0]["pseudo-labels"] for out in ("true", "other")]
    assert st[0] != st[1]  # the measure did look at them
    evidence.main(arguments(camvid_like, tmp_path / "other", "--methods", "ceiling"))
    ceiling, few = (
        load_file(tmp_path / "other/1_8/seed_0" / m / "teacher/model.safetensors") for m in ("ceiling", "supervised")
    )
    assert any(not torch.equal(ceiling[name], few[name]) for name in few)


def result(method: str, seed: int, iou: list[float], fraction: str = "1/8") -> Result:
    miou = sum(iou) / len(iou)
    return Result(method, fraction, seed, miou, iou, 46, 321, {"labels": 0.5} if method == "st" else {}, 60.0, "here")


def test_tables_hold_means_deviations_and_gains() -> None:
    results = [
        result("supervised", 0, [0.4, 0.6]),
        result("supervised", 1, [0.5, 0.7]),
        result("st", 0, [0.5, 0.7]),
        result("st", 1, [0.7, 0.9]),
        result("ceiling", 0, [0.9, 0.9]),
    ]
    titles = {"supervised": "Sup", "st": "ST", "ceiling": "All"}
    miou, classes = evidence_tables.tables(results, ("cat", "dog"), titles).strip().split("\n\n")
    assert "46 of 367" in miou
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in miou.split("\n")]
    assert cells[2] == ["Sup", "50.0", "60.0", "**55.0** ± 7.1", "", "", "1"]
    assert cells[3] == ["ST", "60.0", "80.0", "**70.0** ± 14.1", "+15.0 ± 7.1", "50.0", "1"]
    assert cells[4] == ["All", "90.0", "", "**90.0**", "+40.0", "", "1"]
    assert "| ST | 60.0 | 80.0 |" in classes


def test_csv_is_exact() -> None:
    one = result("st", 3, [1 / 3, float("nan")])
    lines = list(csv.DictReader(evidence_tables.as_csv([one], ("cat", "dog")).splitlines()))
    assert float(lines[0]["iou cat"]) == 1 / 3
    assert lines[0]["pseudo-labels"] == "labels=0.5000"


@pytest.mark.parametrize(("text", "share"), [("1/8", 0.125), ("1/16", 0.0625), ("20", 20)])
def test_fractions_are_read(text: str, share: float) -> None:
    assert evidence_data.share_of(text) == share


def test_images_and_masks_are_resized_alike(camvid_like: Path) -> None:
    source = evidence_data.folder_source(camvid_like, size=(24, 32), classes=CLASSES)
    whole = evidence_data.folder_source(camvid_like, size=None, classes=CLASSES)
    for dataset, original in ((source.train, whole.train), (source.val, whole.val)):
        image, mask = dataset[3]
        assert image.shape == (3, 24, 32)
        large, true = original[3]
        assert (image.float() - large.float().reshape(3, 24, 2, 32, 2).mean((2, 4))).abs().mean() < 6
        corners = torch.stack([true[i::2, j::2] for i in (0, 1) for j in (0, 1)])
        assert (corners == mask).any(0).all()
        assert dataset[3][0] is image  # read once


def test_networks_are_those_of_smp_or_with_a_prefix_the_papers() -> None:
    flags = "--data d --out o --encoder resnet18 --classes a b c --arch"
    for arch, kind in (("DeepLabV3Plus", smp.DeepLabV3Plus), ("stseg.DeepLabV3Plus", stseg.models.DeepLabV3Plus)):
        network = evidence.network_of(evidence.parse([*flags.split(), arch]))
        assert isinstance(network, kind)
        assert stseg.Segmenter(network).eval()(torch.rand(1, 3, 33, 40)).shape == (1, 3, 33, 40)
