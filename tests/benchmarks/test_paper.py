"""The published set-ups, on small trees laid out like VOCdevkit/VOC2012 and like Cityscapes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_examples import load, run_main

import stseg
from stseg.data import ListedFiles
from stseg.errors import DataError
from stseg.inference.mask_files import palette

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "benchmarks" / "paper"
CAMVID = Path(os.environ.get("STSEG_CAMVID", ROOT.parent / "shared" / "camvid"))
TINY = ("--backbone", "test_resnet", "--steps", "3", "--batch-size", "2", "--crop-size", "24")

# The name, value in `labelIds` and class in training of all labels, as Cityscapes publishes them.
CITYSCAPES = (
    ("unlabeled", 0, 255),
    ("ego vehicle", 1, 255),
    ("rectification border", 2, 255),
    ("out of roi", 3, 255),
    ("static", 4, 255),
    ("dynamic", 5, 255),
    ("ground", 6, 255),
    ("road", 7, 0),
    ("sidewalk", 8, 1),
    ("parking", 9, 255),
    ("rail track", 10, 255),
    ("building", 11, 2),
    ("wall", 12, 3),
    ("fence", 13, 4),
    ("guard rail", 14, 255),
    ("bridge", 15, 255),
    ("tunnel", 16, 255),
    ("pole", 17, 5),
    ("polegroup", 18, 255),
    ("traffic light", 19, 6),
    ("traffic sign", 20, 7),
    ("vegetation", 21, 8),
    ("terrain", 22, 9),
    ("sky", 23, 10),
    ("person", 24, 11),
    ("rider", 25, 12),
    ("car", 26, 13),
    ("truck", 27, 14),
    ("bus", 28, 15),
    ("caravan", 29, 255),
    ("trailer", 30, 255),
    ("train", 31, 16),
    ("motorcycle", 32, 17),
    ("bicycle", 33, 18),
    ("license plate", 255, 255),  # -1, in 8 bits
)


@pytest.fixture(scope="module")
def pascal_voc() -> ModuleType:
    return load(PAPER / "pascal_voc.py")


@pytest.fixture(scope="module")
def cityscapes() -> ModuleType:
    return load(PAPER / "cityscapes.py")


def save(path: Path, pixels: np.ndarray[Any, Any], *, colors: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if colors:
        image.putpalette(palette())
    image.save(path)


def write_lists(folder: Path, kind: str, lists: dict[str, list[str]]) -> None:
    (folder / kind).mkdir(parents=True)
    for name, lines in lists.items():
        (folder / kind / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Two images with masks, six without, three to evaluate on; lists of both kinds in ``pairs`` and ``ids``."""
    root, random = tmp_path / "VOC2012", np.random.default_rng(0)
    ids = [f"2007_{number:06d}" for number in range(11)]
    for number, id in enumerate(ids):
        size = (30, 40) if number % 3 else (40, 30)
        image = random.integers(0, 256, (*size, 3), dtype=np.uint8)
        save(root / "JPEGImages" / f"{id}.jpg", image)
        mask = (image[..., 0] > 127).astype(np.uint8) * (number % 4 * 5 + 5)
        mask[:2], mask[:, 10:12] = 255, 255  # void borders
        if not 2 <= number < 8:
            save(root / "SegmentationClass" / f"{id}.png", mask, colors=True)
        if number < 2:
            save(root / "SegmentationClassAug" / f"{id}.png", np.where(mask == 255, 0, mask).astype(np.uint8))
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(ids[8:]) + "\n")
    parts = {"labeled": ids[:2], "unlabeled": ids[2:8], "val": ids[8:]}
    write_lists(tmp_path, "ids", parts)
    write_lists(
        tmp_path,
        "pairs",
        {name: [f"JPEGImages/{id}.jpg SegmentationClass/{id}.png" for id in ids] for name, ids in parts.items()},
    )
    return root


@pytest.fixture
def cities(tmp_path: Path) -> Path:
    """As ``voc``; masks are there as ``labelIds`` and as ``labelTrainIds``."""
    root, random = tmp_path / "cityscapes", np.random.default_rng(0)
    to_class = {value: label for _, value, label in CITYSCAPES}
    values = np.array(list(to_class), dtype=np.uint8)
    parts: dict[str, list[str]] = {"labeled": [], "unlabeled": [], "val": []}
    for number in range(11):
        part, city = ("train", ("aachen", "ulm")[number % 2]) if number < 8 else ("val", "frankfurt")
        kind = "labeled" if number < 2 else "unlabeled" if number < 8 else "val"
        id = f"{city}_{number:06d}_000019"
        parts[kind].append(f"{part}/{city}/{id}")
        save(
            root / "leftImg8bit" / part / city / f"{id}_leftImg8bit.png", random.integers(0, 256, (16, 32, 3), np.uint8)
        )
        if kind != "unlabeled":
            mask = np.resize(random.permutation(values), (16, 32))
            save(root / "gtFine" / part / city / f"{id}_gtFine_labelIds.png", mask)
            mapped = np.array([[to_class[value] for value in row] for row in mask.tolist()], dtype=np.uint8)
            save(root / "gtFine" / part / city / f"{id}_gtFine_labelTrainIds.png", mapped)
    write_lists(tmp_path, "ids", {name: [path.split("/")[-1] for path in paths] for name, paths in parts.items()})
    for suffix in ("labelIds", "labelTrainIds"):
        lines = {
            name: [f"leftImg8bit/{path}_leftImg8bit.png gtFine/{path}_gtFine_{suffix}.png" for path in paths]
            for name, paths in parts.items()
        }
        write_lists(tmp_path, "pairs" if suffix == "labelTrainIds" else suffix, lines)
    return root


def same(one: ListedFiles, other: ListedFiles) -> bool:
    return one.ids == other.ids and all(
        torch.equal(a, b) for pairs in zip(one, other, strict=True) for a, b in zip(*pairs, strict=True)
    )


class TestListsOfPascal:
    def test_of_ids_and_of_files_are_the_same(self, pascal_voc, voc):
        lists = voc.parent
        pairs = pascal_voc.listed(voc, lists / "pairs" / "labeled.txt", "train", "SegmentationClass")
        ids = pascal_voc.listed(voc, lists / "ids" / "labeled.txt", "train", "SegmentationClass")
        assert pairs.ids == ["JPEGImages/2007_000000", "JPEGImages/2007_000001"]
        assert same(pairs, ids)
        (lists / "images.txt").write_text("JPEGImages/2007_000000.jpg\nJPEGImages/2007_000001.jpg\n")
        assert same(pairs, pascal_voc.listed(voc, lists / "images.txt", "train", "SegmentationClass"))

    def test_give_the_indices_of_palettes_and_ignore_borders(self, pascal_voc, voc):
        dataset = pascal_voc.listed(voc, voc.parent / "ids" / "labeled.txt", "train", "SegmentationClass")
        for id, (image, mask) in zip(("2007_000000", "2007_000001"), dataset, strict=True):
            with Image.open(voc / "SegmentationClass" / f"{id}.png") as png:
                assert png.mode == "P"
                assert np.array_equal(mask, np.array(png))
            with Image.open(voc / "JPEGImages" / f"{id}.jpg") as jpeg:
                assert np.array_equal(image.permute(1, 2, 0), np.array(jpeg))
            assert (mask[:2] == 255).all()

    def test_of_ids_may_stand_for_the_augmented_masks(self, pascal_voc, voc):
        dataset = pascal_voc.listed(voc, voc.parent / "ids" / "labeled.txt", "train", "SegmentationClassAug")
        assert not (dataset[0][1] == 255).any()

    @pytest.mark.parametrize("kind", ["pairs", "ids"])
    def test_without_masks_need_none(self, pascal_voc, voc, kind):
        dataset = pascal_voc.listed(voc, voc.parent / kind / "unlabeled.txt", "train", "SegmentationClass", masks=False)
        assert len(dataset) == 6
        assert isinstance(dataset[0], torch.Tensor)
        with pytest.raises(DataError, match=r"unlabeled\.txt, line 1: there is no mask .*2007_000002\.png"):
            pascal_voc.listed(voc, voc.parent / kind / "unlabeled.txt", "train", "SegmentationClass")


class TestListsOfCityscapes:
    def test_map_all_labels_to_the_19_classes(self, cityscapes, tmp_path):
        values = np.array([[value for _, value, _ in CITYSCAPES]], dtype=np.uint8)
        files = "leftImg8bit/train/ulm/ulm_0_0_leftImg8bit.png", "gtFine/train/ulm/ulm_0_0_gtFine_labelIds.png"
        save(tmp_path / files[0], np.zeros((1, len(CITYSCAPES), 3), dtype=np.uint8))
        save(tmp_path / files[1], values)
        (tmp_path / "list.txt").write_text("ulm_0_0\n")
        mask = cityscapes.listed(tmp_path, tmp_path / "list.txt", "train", "labelIds")[0][1]
        assert len(CITYSCAPES) == 35
        assert mask.tolist() == [[label for _, _, label in CITYSCAPES]]
        assert list(cityscapes.CLASSES) == [name for name, _, label in CITYSCAPES if label != 255]

    def test_of_ids_and_of_files_are_the_same(self, cityscapes, cities):
        def listed(path: str, masks: str = "labelIds") -> ListedFiles:
            dataset: ListedFiles = cityscapes.listed(cities, cities.parent / path, "train", masks)
            return dataset

        pairs = listed("pairs/labeled.txt")  # of labelTrainIds
        assert pairs.ids[0] == "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit"
        assert same(pairs, listed("labelIds/labeled.txt"))
        assert same(pairs, listed("ids/labeled.txt"))
        assert same(pairs, listed("ids/labeled.txt", "labelTrainIds"))
        for number, line in enumerate(
            (
                "aachen/aachen_000000_000019",
                "train/aachen/aachen_000000_000019",
                "aachen_000000_000019_leftImg8bit",
                "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",
            )
        ):
            (cities.parent / f"{number}.txt").write_text(f"{line}\nulm_000001_000019\n")
            assert same(pairs, listed(f"{number}.txt"))

    def test_are_all_of_the_validation_part_without_one(self, cityscapes, cities):
        every = cityscapes.listed(cities, None, "val", "labelIds")
        assert same(every, cityscapes.listed(cities, cities.parent / "pairs" / "val.txt", "val", "labelIds"))
        assert len(every) == 3

    @pytest.mark.parametrize("kind", ["pairs", "ids"])
    def test_without_masks_need_none(self, cityscapes, cities, kind):
        path = cities.parent / kind / "unlabeled.txt"
        assert len(cityscapes.listed(cities, path, "train", "labelIds", masks=False)) == 6
        with pytest.raises(DataError, match=r"unlabeled\.txt, line 1: there is no mask"):
            cityscapes.listed(cities, path, "train", "labelIds")

    def test_of_two_kinds_of_masks_are_refused(self, cityscapes, cities):
        lines = [
            (cities.parent / kind / "labeled.txt").read_text().splitlines()[row]
            for row, kind in enumerate(("pairs", "labelIds"))
        ]
        (cities.parent / "list.txt").write_text("\n".join(lines))
        with pytest.raises(SystemExit, match=r"list\.txt names labelIds and other masks"):
            cityscapes.listed(cities, cities.parent / "list.txt", "train", "labelIds")


def numbers(out: str, classes: tuple[str, ...]) -> tuple[dict[str, float], dict[str, float]]:
    """The mIoU of each stage and the IoU of each class that were printed."""
    stages = {name: float(value) for name, value in re.findall(r"^(\S+): mIoU (\S+)$", out, re.M)}
    found = {name: float(value) for value, name in re.findall(r"^ *(nan|[\d.]+)  (.+)$", out, re.M)}
    assert tuple(found) == classes
    return stages, found


def iou_by_hand(model: torch.nn.Module, dataset: ListedFiles, classes: int) -> np.ndarray[Any, Any]:
    """IoU of each class in percent, from the pixels of all images, with numpy."""
    both, either = np.zeros(classes), np.zeros(classes)
    for image, true in dataset:
        with torch.no_grad():
            guess = model.eval()(image[None])[0].argmax(0).numpy()
        for label in range(classes):
            a, b = (guess == label) & (true.numpy() != 255), true.numpy() == label
            both[label] += (a & b).sum()
            either[label] += (a | b).sum()
    with np.errstate(invalid="ignore"):
        return 100 * both / either


def check_run(out: Path, printed: str, make: Any, classes: tuple[str, ...], val: ListedFiles) -> None:
    """The numbers are those of the network that is in the work directory, and there are masks of what had none."""
    stages, found = numbers(printed, classes)
    assert list(stages) == ["teacher", "student-1", "student-2"]
    network = make("test_resnet", num_classes=len(classes))
    network.load_state_dict(load_file(out / "student-2" / "model.safetensors"))
    expected = iou_by_hand(stseg.Segmenter(network), val, len(classes))
    assert list(found.values()) == pytest.approx(list(expected), abs=0.3, nan_ok=True)
    assert stages["student-2"] == pytest.approx(np.nanmean(expected), abs=0.3)
    assert len([*out.glob("reliable/masks/**/*.png"), *out.glob("unreliable/masks/**/*.png")]) == 6
    assert len(stseg.Ranking.from_csv(out / "ranking" / "ranking.csv")) == 6
    assert all(name in (out / "report.html").read_text() for name in classes)


def arguments(root: Path, kind: str, out: Path) -> list[str]:
    lists = {name: str(root.parent / kind / f"{name}.txt") for name in ("labeled", "unlabeled")}
    return ["--data", str(root), *(x for name, path in lists.items() for x in (f"--{name}", path)), "--out", str(out)]


def test_pascal_voc(pascal_voc, voc, tmp_path, monkeypatch, capsys):
    given = arguments(voc, "pairs", tmp_path / "run")
    run_main(pascal_voc, monkeypatch, *given, *TINY, "--network", "PSPNet")
    printed = capsys.readouterr().out
    val = pascal_voc.listed(voc, voc.parent / "pairs" / "val.txt", "val", "SegmentationClass")
    check_run(tmp_path / "run", printed, stseg.models.PSPNet, pascal_voc.CLASSES, val)
    # Once more, with lists of ids: everything is done, and of the same data.
    run_main(pascal_voc, monkeypatch, *arguments(voc, "ids", tmp_path / "run"), *TINY, "--network", "PSPNet")
    assert capsys.readouterr().out == printed


def test_cityscapes(cityscapes, cities, tmp_path, monkeypatch, capsys):
    given = arguments(cities, "ids", tmp_path / "run")
    run_main(cityscapes, monkeypatch, *given, *TINY)
    val = cityscapes.listed(cities, None, "val", "labelTrainIds")
    printed = capsys.readouterr().out
    check_run(tmp_path / "run", printed, stseg.models.DeepLabV3Plus, cityscapes.CLASSES, val)


def test_two_processes_run_an_experiment_and_one_prints(pascal_voc, voc, tmp_path):
    tiny = [*TINY, "--batch-size", "4", "--network", "DeepLabV2"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(PAPER / "pascal_voc.py"), *arguments(voc, "ids", tmp_path / "run"), *tiny]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    val = pascal_voc.listed(voc, voc.parent / "ids" / "val.txt", "val", "SegmentationClass")
    check_run(tmp_path / "run", done.stdout, stseg.models.DeepLabV2, pascal_voc.CLASSES, val)
    assert len(done.stdout.splitlines()) == 3 + len(pascal_voc.CLASSES) + 1
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["config"]
    assert settings["head_lr_factor"] == 1


class TestSettings:
    """What an experiment hands to the trainer, which is replaced."""

    @pytest.fixture
    def handed(self, monkeypatch):
        handed = SimpleNamespace()

        class Trainer:
            def __init__(self, make_model: Any, **options: Any) -> None:
                handed.make_model, handed.options = make_model, options

            def fit(self, labeled: Any, unlabeled: Any, val: Any) -> None:
                handed.data = labeled, unlabeled, val
                raise KeyboardInterrupt

        monkeypatch.setattr(stseg, "SelfTrainer", Trainer)
        for name in ("PSPNet", "DeepLabV3Plus", "DeepLabV2"):
            monkeypatch.setattr(
                stseg.models, name, lambda backbone, name=name, **options: (name, backbone, options["pretrained"])
            )
        return handed

    def run(self, module, monkeypatch, *given):
        with pytest.raises(KeyboardInterrupt):
            run_main(module, monkeypatch, *given)

    def test_are_the_papers(self, pascal_voc, cityscapes, voc, tmp_path, monkeypatch, handed):
        self.run(pascal_voc, monkeypatch, *arguments(voc, "pairs", tmp_path / "run"))
        assert handed.options["config"] == stseg.TrainConfig.pascal(precision="fp32")
        assert (handed.options["method"], handed.options["keep"]) == ("st++", "final")
        assert handed.options["num_classes"] == 21
        assert [len(dataset) for dataset in handed.data] == [2, 6, 3]
        assert handed.make_model() == ("DeepLabV3Plus", "resnet50", False)

    def test_of_cityscapes_are_the_papers(self, cityscapes, cities, tmp_path, monkeypatch, handed):
        self.run(cityscapes, monkeypatch, *arguments(cities, "pairs", tmp_path / "run"))
        assert handed.options["config"] == stseg.TrainConfig.cityscapes(eval_batch_size=2, precision="fp32")
        assert handed.options["num_classes"] == 19
        assert [len(dataset) for dataset in handed.data] == [2, 6, 3]
        assert handed.make_model() == ("DeepLabV3Plus", "resnet50", False)

    def test_may_be_others(self, pascal_voc, voc, tmp_path, monkeypatch, handed):
        given = [*arguments(voc, "ids", tmp_path / "run"), "--method", "st", "--keep", "best", "--batch-size", "8"]
        self.run(pascal_voc, monkeypatch, *given, "--network", "DeepLabV2", "--pretrained", "--bf16", "--seed", "7")
        expected = stseg.TrainConfig.pascal(batch_size=8, head_lr_factor=1, precision="bf16", seed=7)
        assert handed.options["config"] == expected
        assert expected.lr == 0.0005
        assert (handed.options["method"], handed.options["keep"]) == ("st", "best")
        assert handed.make_model() == ("DeepLabV2", "resnet101.tv_in1k", True)

    def test_take_a_backbone_at_its_word(self, cityscapes, cities, tmp_path, monkeypatch, handed):
        given = [*arguments(cities, "ids", tmp_path / "run"), "--pretrained", "--backbone", "resnet50.a1_in1k"]
        self.run(cityscapes, monkeypatch, *given, "--epochs", "5", "--crop-size", "65", "--num-workers", "3")
        weak = stseg.WeakAugment(65, base_size=2048)
        expected = stseg.TrainConfig.cityscapes(epochs=5, weak=weak, num_workers=3, eval_batch_size=2, precision="fp32")
        assert handed.options["config"] == expected
        assert handed.make_model() == ("DeepLabV3Plus", "resnet50.a1_in1k", True)

    @pytest.mark.parametrize("backbone", ["resnet50d", "convnext_tiny", "resnet50.a1_in1k"])
    def test_name_weights_of_the_papers_backbones_alone(self, pascal_voc, voc, tmp_path, monkeypatch, handed, backbone):
        given = [*arguments(voc, "ids", tmp_path / "run"), "--pretrained", "--backbone", backbone]
        self.run(pascal_voc, monkeypatch, *given)
        assert handed.make_model()[1] == backbone

    @pytest.mark.parametrize(("name", "data"), [("pascal_voc", "voc"), ("cityscapes", "cities")])
    def test_draw_a_fraction_and_take_the_masks_of_no_others(self, name, data, request, tmp_path, monkeypatch, handed):
        module, root = request.getfixturevalue(name), request.getfixturevalue(data)
        given = arguments(root, "ids", tmp_path / "run")
        at = given.index("--unlabeled")
        given[at : at + 2] = ["--fraction", "1/2"]
        drawn = []
        for seed in (*range(8), 3):
            self.run(module, monkeypatch, *given, "--seed", str(seed))
            labeled, unlabeled, val = handed.data
            assert (len(labeled), len(unlabeled), len(val)) == (1, 1, 3)
            assert len(labeled[0]) == 2
            assert unlabeled[0].ndim == 3  # an image alone
            (few,), (others,) = ([part.dataset.ids[index] for index in part.indices] for part in (labeled, unlabeled))
            assert few != others
            drawn.append(few)
        assert set(drawn) == {few, others}
        assert drawn[8] == drawn[3]
        with pytest.raises(SystemExit):
            run_main(module, monkeypatch, *given, "--unlabeled", str(root.parent / "ids" / "unlabeled.txt"))

    def test_are_told_in_few_lines_beside_the_runner(self):
        for name in ("pascal_voc", "cityscapes", "camvid"):
            assert len((PAPER / f"{name}.py").read_text().splitlines()) <= 65


def check_camvid_run(out: Path, unlabeled: set[str]) -> None:
    done = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"run.json", "teacher/model.safetensors", "teacher/history.jsonl", "ranking/ranking.csv"} <= done
    labeled = {path.stem for step in ("reliable", "unreliable") for path in (out / step / "masks").glob("*.png")}
    assert labeled == unlabeled
    assert set(stseg.Ranking.from_csv(out / "ranking" / "ranking.csv").ids) == unlabeled
    assert "report.html" in done


def test_camvid_on_a_folder_of_its_layout(
    camvid_like: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data", str(camvid_like), "--out", str(tmp_path / "run"), "--steps", "3", "--height", "24")
    run_main(load(PAPER / "camvid.py"), monkeypatch, *arguments, "--arch", "FPN", "--encoder", "tu-test_resnet")
    assert "student-2: mIoU" in capsys.readouterr().out
    check_camvid_run(tmp_path / "run", {f"{i:03d}" for i in range(2, 8)})


@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID} (set STSEG_CAMVID)")
def test_camvid_on_camvid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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
    run_main(load(PAPER / "camvid.py"), monkeypatch, *run, "--arch", "FPN", "--encoder", "tu-test_resnet")
    assert "student-2: mIoU" in capsys.readouterr().out
    check_camvid_run(tmp_path / "run", set(ids[3:5]))
