"""The report of a run: one file that says what was run, how well it did, and what went wrong."""

from __future__ import annotations

import builtins
import dataclasses
import io
import math
import re
import shutil
import subprocess
from base64 import b64decode
from datetime import datetime
from pathlib import Path
from urllib.parse import unquote

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_page import Page
from torch import nn

import stseg
from stseg.data.items import Items
from stseg.engine.loop import FitResult
from stseg.inference.mask_files import palette
from stseg.methods import ST, Labeling, STPlusPlus
from stseg.models.segmenter import as_segmenter
from stseg.stages import predictions, report, stages, summary
from stseg.stages.charts import Charts
from stseg.stages.galleries import Gallery, Picture, draw_galleries
from stseg.stages.page import Html, duration, element, escape
from stseg.stages.predictions import predict_pictures, read_predictions
from stseg.stages.problems import find_problems, iou_of
from stseg.stages.summary import TrainingSummary, read_run, summarize_result
from stseg.stages.wording import describe_curve, show_settings

IDS = ["a", "&amp;'b'", "street/0001 with a name", "日本's"]
COLORS = np.array(palette()).reshape(-1, 3)


class Named(list):
    def __init__(self, items, ids) -> None:
        super().__init__(items)
        self.ids = ids


def drawn(channels=3, size=(16, 20), count=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, channels, *size, generator=generator)
    return [(image, (image[0] > 0.5).byte()) for image in images[:2]], Named(list(images[2:]), IDS)


def trainer(method="st++", workdir=None, *, channels=3, make=None, **options):
    if method == "st++":
        method = STPlusPlus(labeling=Labeling(tta=None))
    elif method == "st":
        method = ST(labeling=Labeling(tta=None))
    config = stseg.TrainConfig(steps=4, batch_size=2, weak=stseg.WeakAugment(16), eval_every=2)
    options = {"num_classes": 2, "config": config, "workdir": workdir, "progress": False, **options}
    return stseg.SelfTrainer(make or (lambda: nn.Conv2d(channels, 2, 1)), method=method, **options)


def run(method="st++", workdir=None, *, val=None, channels=3, size=(16, 20), **options):
    labeled, unlabeled = drawn(channels, size)
    return trainer(method, workdir, channels=channels, **options).fit(labeled, unlabeled, val)


def held_out():
    generator = torch.Generator().manual_seed(1)
    return [(image, (image[0] > 0.6).byte()) for image in torch.rand(3, 3, 16, 20, generator=generator)]


@pytest.fixture
def no_curves(monkeypatch):
    """Leaves out what takes longest, where it does not matter."""
    monkeypatch.setattr(Charts, "lines", lambda *_, **__: Html(""))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of ST++ with a validation set, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "first & best"
    return run("st++", folder, val=held_out(), class_names=["back", "<disc>"]), folder


@pytest.mark.parametrize(
    ("method", "sections", "option"),
    [
        ("supervised", {"what-was-run", "steps", "training", "classes", "all-settings"}, "double below 200"),
        ("st", {"pseudo-labels"}, "pseudo weight 1.0"),
        ("st++", {"ranking", "pseudo-labels"}, "reliable fraction 0.5"),
        (lambda make: stseg.methods.FixMatch(make()), {"training"}, "threshold 0.95"),
    ],
    ids=["supervised", "st", "st++", "fixmatch"],
)
def test_a_run_with_a_work_directory_ends_with_a_page_of_one_file(tmp_path, method, sections, option):
    result = run(method, tmp_path)
    page = Page(tmp_path / "report.html")
    assert not (tmp_path / "figures").exists()
    assert sections <= set(page.ids)
    assert {row[0] for row in page.tables["Steps of the run, in order"][1:]} == set(result.seconds)
    for word in (option, "config.batch_size", "torch", stseg.__version__, "4 steps", "batches of 2 images", "seed 0"):
        assert word in page.text
    assert "Conv2d: 8 parameters" in page.text
    assert f"{datetime.now():%Y}" in page.text


class TestTitleAndHeadline:
    def test_the_title_is_the_method_and_the_folder_or_the_one_that_is_given(self, finished, tmp_path):
        result, folder = finished
        assert "<title>ST++: first &amp; best</title>" in (folder / "report.html").read_text()
        assert f"<title>{tmp_path.name}</title>" in stseg.write_report(result, tmp_path).read_text()  # not known there
        path = stseg.write_report(result, tmp_path, title="<b>Über alles</b>")
        assert "<h1>&lt;b&gt;Über alles&lt;/b&gt;</h1>" in path.read_text(encoding="utf-8")
        Page(path)

    def test_the_score_is_that_of_the_last_training(self, finished):
        result, folder = finished
        page = Page(folder / "report.html")
        last = result.stages["student-2"].history[-1]["miou"]
        assert f"{100 * last:.1f} %\nmean IoU on 3 validation images, of student-2\n" in page.text
        for words in ("Labeled\n2 images", "Unlabeled\n4 images", "Validation\n3 images", "ST++"):
            assert words in page.text

    def test_with_the_best_weights_it_is_the_best(self, tmp_path):
        rows = [{"step": 2.0 * place, "miou": miou} for place, miou in enumerate((0.25, 0.75, math.nan, 0.5), 1)]
        training = TrainingSummary(rows, {}, {}, ())
        assert training.row("final")["miou"] == 0.5
        assert training.row("best")["miou"] == 0.75
        assert TrainingSummary((), {}, {}, ()).row("best") is None
        run("supervised", tmp_path, val=held_out(), keep="best")
        page = Page(tmp_path / "report.html")
        text = page.text
        assert page.tables["IoU of each class on the validation images"][0] == ["Class", "IoU"]
        history = read_run(tmp_path).trainings["teacher"].history
        best = max(row["miou"] for row in history)
        assert f"{100 * best:.1f} %\nmean IoU on 3 validation images, which chose the weights\n" in text

    def test_without_validation_it_says_so(self, tmp_path):
        run("supervised", tmp_path)
        assert "No mIoU: the run has no validation images." in Page(tmp_path / "report.html").text

    def test_the_time_is_that_of_the_run(self, finished, tmp_path):
        result, folder = finished
        assert "finished on" in Page(folder / "report.html").text
        assert "written on" in Page(stseg.write_report(result, tmp_path)).text
        assert f"Duration\n{duration(sum(result.seconds.values()))}" in Page(tmp_path / "report.html").text


class TestCurves:
    def test_there_is_one_for_all_that_was_logged(self, tmp_path):
        result = run(lambda make: stseg.methods.FixMatch(make()), tmp_path, val=held_out())
        page = Page(tmp_path / "report.html")
        names = set(result.stages["train"].history[0]) - {"epoch", "step", "lr", "seconds", "miou", "loss"}
        names = {name for name in names if not name.startswith("iou/")}
        assert len(names) >= 3
        drawn = {label.split(":")[0] for label in page.labels if " over step" in label}
        assert drawn == names | {"loss (total)", "mIoU on the validation images"}

    def test_says_what_each_method_logs(self):
        logged = re.compile(r"Logged: (.*?)\n\n", re.S)
        for method in map(stseg.methods.__dict__.get, stseg.methods.__all__):
            for text in logged.findall(getattr(method, "__doc__", None) or ""):
                names = re.findall("``(\\w+)``", text)
                assert names
                for name in names:
                    assert describe_curve(name).startswith(f"{name}: "), (method, name)
                    assert describe_curve(name) != describe_curve("unknown").replace("unknown", name), (method, name)
        assert describe_curve("loss") == "loss (total)"
        assert describe_curve("unknown") == "unknown: as logged"

    def test_that_there_are_none_without_matplotlib_is_logged(self, tmp_path, monkeypatch, caplog):
        def without(name, *arguments, real=builtins.__import__, **options):
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return real(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", without)
        with caplog.at_level("INFO", "stseg"):
            run("supervised", tmp_path)
        assert [record.message for record in caplog.records].count(
            'the report has no curves, which need matplotlib: pip install "stseg[report]"'
        ) == 1
        caplog.clear()
        with caplog.at_level("INFO", "stseg"):
            run("supervised")  # which writes no report
        assert "matplotlib" not in caplog.text

    def test_ids_are_unique_and_names_are_literal(self, tmp_path):
        charts = Charts()
        lines = {"$x^2$ <b>": ([1, 2], [0.1, math.nan]), "_hidden": ([1, 2], [math.inf, 3.0]), "\udcff": ([1], [1.0])}
        before = dict(matplotlib.rcParams)
        parts = [charts.lines("a & b", lines, x="step", y="$loss$") for _ in range(2)]
        parts.append(charts.histogram("h", [0.1, 0.5], x="s", y="images", cut=0.3, parts=("more", "less")))
        assert dict(matplotlib.rcParams) == before
        path = tmp_path / "page.html"
        path.write_text(f"<!doctype html>\n<html>{''.join(parts)}</html>")
        text = Page(path).text
        assert {"$x^2$ <b>", "_hidden"} <= {line.strip() for line in text.split("\n")}
        assert "currentColor" in path.read_text()
        assert charts.lines("none", {}, x="x", y="y") == ""

    @pytest.mark.parametrize("values", [[0.5], [3.0, 3.0], [-1.0, 700.0], [0.0, 1.0]])
    def test_a_histogram_of_any_scores(self, values):
        text = Charts().histogram("h", values, x="score", y="images", cut=None, parts=("a", "b"))
        assert f"h: {len(values)} images by score" in text

    def test_of_many_lines_are_told_apart(self):
        lines = {f"run {number}": ([1.0, 2.0], [1.0, number]) for number in range(20)}
        assert Charts().lines("many", lines, x="x", y="y").count("stroke-dasharray") >= 12

    def test_without_matplotlib_there_are_tables_and_pictures(self, tmp_path, monkeypatch):
        real = builtins.__import__

        def without(name, *arguments, **options):
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return real(name, *arguments, **options)

        monkeypatch.setattr(builtins, "__import__", without)
        run("st++", tmp_path)
        page = Page(tmp_path / "report.html")
        assert "<svg" not in page.source
        assert "pip install stseg[report]" in page.text
        assert "student-2" in page.text
        assert sum("pseudo-mask" in alt for alt in page.pictures) == len(IDS)


@pytest.mark.usefixtures("no_curves")
class TestClasses:
    def test_shares_are_those_of_a_count_by_hand(self, finished):
        result, folder = finished
        rows = Page(folder / "report.html").tables["Share of the pixels of each class"]
        assert rows[0] == ["Class", "labeled", "validation", "pseudo-masks: reliable", "pseudo-masks: unreliable"]
        assert [row[0] for row in rows[1:]] == ["back", "<disc>", "ignored"]
        masks = {"labeled": [mask for _, mask in drawn()[0]], "validation": [mask for _, mask in held_out()]}
        masks |= {f"pseudo-masks: {name}": [mask for _, mask in data] for name, data in result.labels.items()}
        for column, name in enumerate(rows[0][1:], 1):
            pixels = torch.cat([mask.flatten() for mask in masks[name]])
            for index in (0, 1):
                assert rows[1 + index][column] == f"{100 * float((pixels == index).float().mean()):.2f} %"

    def test_at_most_some_masks_are_counted_evenly_and_it_says_how_many(self, finished, tmp_path, monkeypatch):
        result, _ = finished
        monkeypatch.setattr(summary, "MOST_COUNTED", 2)
        page = Page(stseg.write_report(result, tmp_path))
        assert "counted in 1 of the 2 masks of reliable, 1 of the 2 masks of unreliable, evenly spaced." in page.text

    def test_iou_by_class_and_stage_is_that_of_the_rows_that_count(self, finished, tmp_path):
        result, _ = finished
        stages = {
            name: dataclasses.replace(
                stage, history=[{**row, "iou/0": 0.25 + place / 8, "iou/1": math.nan} for row in stage.history]
            )
            for place, (name, stage) in enumerate(result.stages.items())
        }
        path = stseg.write_report(dataclasses.replace(result, stages=stages), tmp_path, class_names=["x", "y"])
        page = Page(path)
        rows = page.tables["IoU of each class on the validation images, after each training"]
        assert rows[:3] == [
            ["Class", "teacher", "student-1", "student-2"],
            ["x", "25.0 %", "37.5 %", "50.0 %"],
            ["y", "–", "–", "–"],
        ]
        assert page.tables["IoU of each class"] == [["Class", "IoU"], ["x", "50.0 %"], ["y", "–"]]
        assert not any(label.startswith("iou/") for label in page.labels)

    def test_iou_of_rows(self):
        assert iou_of(None) == iou_of({"miou": 0.5}) == []
        assert iou_of({"iou/2": 0.5, "iou/10": 0.25})[2] == 0.5
        assert len(iou_of({"iou/2": 0.5, "iou/10": 0.25})) == 11

    @pytest.mark.parametrize(
        ("names", "error", "message"),
        [
            (["one"], ValueError, "class_names has 1 names; expected 2, one for each class"),
            ("ab", TypeError, "class_names is 'ab'; expected a list of names"),
            ([0, 1], TypeError, "expected a list of names"),
            ({"a", "b"}, TypeError, "expected a list of names"),
        ],
    )
    def test_names_that_do_not_fit_are_refused(self, finished, tmp_path, names, error, message):
        with pytest.raises(error, match=message):
            stseg.write_report(finished[0], tmp_path, class_names=names)
        with pytest.raises(error, match=message):
            trainer(class_names=names)
        assert not list(tmp_path.iterdir())

    def test_names_may_change_when_a_run_goes_on(self, tmp_path):
        first = run("supervised", tmp_path, class_names=["a", "b"])
        before = (tmp_path / "report.html").read_bytes()
        again = run("supervised", tmp_path, class_names=["c", "d"])
        assert again.stages["teacher"].history == first.stages["teacher"].history
        assert (tmp_path / "report.html").read_bytes() == before  # all was done
        (tmp_path / "report.html").unlink()
        run("supervised", tmp_path, class_names=["c", "d"])
        rows = Page(tmp_path / "report.html").tables["Share of the pixels of each class"]
        assert [row[0] for row in rows[1:3]] == ["c", "d"]


class Constant(nn.Module):
    """Always predicts class 0; of two, so that its loss is finite."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return 1e-3 * self.conv(x) + torch.tensor([9.0, 0.0]).reshape(2, 1, 1)


@pytest.mark.usefixtures("no_curves")
class TestProblems:
    def test_a_network_that_predicts_the_background_alone(self, tmp_path):
        run("st++", tmp_path, val=held_out(), make=Constant, class_names=["sky", "disc"])
        page = Page(tmp_path / "report.html")
        assert "What is wrong" in page.text
        for name in ("teacher", "student-1", "student-2"):
            assert f"{name} predicts class 0 (sky) alone on the validation images." in page.text
        assert "Class 0 (sky) is the only class in the 2 pseudo-masks of 'reliable'" in page.text

    @settings(max_examples=40)
    @given(st.lists(st.integers(0, 40), min_size=2, max_size=5), st.integers(0, 4), st.booleans())
    def test_one_class_alone_is_found_by_iou_or_their_mean(self, pixels, predicted, by_class):
        metric = stseg.MeanIoU(len(pixels))
        target = torch.repeat_interleave(torch.arange(len(pixels)), torch.tensor(pixels))
        predicted = min(predicted, len(pixels) - 1)
        metric.update(torch.full_like(target, predicted), target)
        row = {"step": 1.0, "miou": metric.compute(), "seconds": 1.0}
        row |= {f"iou/{index}": value for index, value in enumerate(metric.iou().tolist())} if by_class else {}
        found = find_problems(of(row, pixels), {})
        several = sum(map(bool, pixels)) > 1
        like = [index for index, count in enumerate(pixels) if count == pixels[predicted]]
        names = " or ".join(f"class {index}" for index in ([predicted] if by_class else like))
        said = f"teacher predicts {names} alone on the validation images." in found
        assert said == (several and pixels[predicted] > 0)

    def test_one_class_found_while_others_are_predicted(self):
        row = {"step": 1.0, "miou": 0.2, "iou/0": 0.4, "iou/1": 0.0, "seconds": 1.0}
        assert find_problems(of(row, [50, 50]), {}) == [
            "teacher finds class 0 alone on the validation images: the IoU of every other class is 0."
        ]

    def test_a_network_that_finds_several_has_none(self):
        row = {"step": 1.0, "miou": 0.45, "iou/0": 0.4, "iou/1": 0.5, "seconds": 1.0}
        assert find_problems(of(row, [50, 50]), {}) == []
        assert find_problems(of({"step": 1.0, "miou": 0.45, "seconds": 1.0}, [50, 50]), {}) == []

    def test_a_score_that_is_no_number(self):
        (text,) = find_problems(of({"step": 1.0, "miou": math.nan, "seconds": 1.0}, [50, 50]), {})
        assert text.startswith("The mIoU of teacher is not a number")

    def test_classes_that_vanished(self, finished):
        _, folder = finished
        told = read_run(folder)
        counts = {name: told.count_classes(name) for name in told.labelings}
        counts["reliable"].pixels[:] = torch.tensor([9, 0])
        told.data["labeled classes"]["pixels"] = [6, 1]
        with_third = dataclasses.replace(told, data={**told.data, "labeled classes": {"pixels": [6, 1, 1]}},
                                         class_names=("a", "b", "c"))  # fmt: skip
        counts["unreliable"].pixels[:] = torch.tensor([1, 1])
        found = find_problems(with_third, counts)
        assert "Class 0 (a) is the only class in the 2 pseudo-masks of 'reliable' that were counted (labeled by " \
            "teacher)." in found  # fmt: skip
        assert "No pixel of the 2 pseudo-masks of 'unreliable' that were counted (labeled by student-1) has class 2 " \
            "(c), which has 12.50 % of the labeled pixels." in found  # fmt: skip
        counts["unreliable"].pixels[:] = 0
        assert any("are left out: no prediction reaches" in text for text in find_problems(with_third, counts))

    def test_a_student_that_is_worse_than_the_teacher(self, finished):
        told = read_run(finished[1])
        rows = {"teacher": 0.6, "student-2": 0.55}
        trainings = {name: TrainingSummary([{"step": 1.0, "miou": miou}], {}, {}, ()) for name, miou in rows.items()}
        found = find_problems(dataclasses.replace(told, trainings=trainings), {})
        assert "student-2 is worse than teacher on the validation images: mIoU 55.0 % after 60.0 %." in found

    def test_warnings_of_the_run_and_its_trainings(self, finished, tmp_path):
        result = dataclasses.replace(finished[0])
        stage = dataclasses.replace(result.stages["teacher"])
        object.__setattr__(result, "warnings", {"labels": ("the <run>",)})
        object.__setattr__(stage, "warnings", ("the teacher", "the <run>"))
        result.stages["teacher"], before = stage, result.stages["teacher"]
        try:
            page = Page(stseg.write_report(result, tmp_path))
        finally:
            result.stages["teacher"] = before
        assert page.text.count("the <run>") == 1
        assert "the teacher" in page.text


def of(row, pixels):
    """A run of one training with one row, and a validation set of these pixels."""
    data = {"validation": "3 items, 00000000", "validation classes": {"pixels": pixels}}
    return summary.RunSummary(
        Path("run"), {}, data, {}, {"teacher": TrainingSummary([row], {}, {}, ())}, {}, None, None, None, (), {}, None,
        True, None, (),
    )  # fmt: skip


@pytest.mark.usefixtures("no_curves")
class TestGalleries:
    def test_masks_are_those_of_the_store_in_its_colors_over_their_images(self, finished):
        result, folder = finished
        page = Page(folder / "report.html")
        labeled = {f"{kind} {id}" for id in IDS for kind in ("image", "pseudo-mask of")}
        predicted = {f"{kind} {id}" for id in "012" for kind in ("validation image", "true mask of", "prediction for")}
        assert set(page.pictures) == labeled | predicted | {""}
        for data in result.labels.values():
            for id, (image, mask) in zip(data.ids, data, strict=True):
                overlay = page.picture(f"pseudo-mask of {id}")
                assert np.array_equal(overlay[..., :3], COLORS[mask.numpy()])
                assert (overlay[..., 3] == 255).all()
                shown = page.picture(f"image {id}").astype(float)
                assert abs(shown.mean((0, 1)) - 255 * image.mean((1, 2)).numpy()).max() < 8

    def test_say_who_labeled_an_image_and_its_score(self, finished):
        result, folder = finished
        text = Page(folder / "report.html").text
        for place, (id, score) in enumerate(zip(result.ranking.ids, result.ranking.scores, strict=True)):
            by = "teacher" if place < 2 else "student-1"
            assert f"{id}\nstability {score:.3f}, place {place + 1} of 4\nmask of {by}\n" in text
        assert result.labeled_by == {"reliable": "teacher", "unreliable": "student-1"}

    def test_of_ignored_pixels_have_no_color(self, tmp_path):
        store = stseg.MaskStore()
        mask = torch.tensor([[0, 1], [255, 1]], dtype=torch.uint8)
        store["x"] = mask
        data = stseg.PseudoLabeled([torch.rand(3, 2, 2)], store, indices=[0], ids=["x"])
        galleries = [Gallery("All", "", [Picture(data, 0, None, "")]), Gallery("None", "", [])]
        path = tmp_path / "page.html"
        text = draw_galleries(galleries, ignore_index=255, class_name=str)
        path.write_text(f"<!doctype html>\n<html>{text}</html>")
        page = Page(path)
        assert page.picture("pseudo-mask of x")[..., 3].tolist() == [[255, 255], [0, 255]]
        assert "no color" in page.text
        assert "None" not in page.text
        assert draw_galleries([], ignore_index=255, class_name=str) == ""

    @pytest.mark.parametrize("channels", [1, 2, 4])
    def test_images_of_any_channels_can_be_shown(self, tmp_path, channels):
        run("st++", tmp_path, channels=channels)
        assert Page(tmp_path / "report.html").picture("image a").ndim == (3 if channels == 4 else 2)

    @pytest.mark.parametrize("size", [(1, 1), (1, 900), (700, 600)])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    def test_images_of_any_size_become_small_files(self, size, dtype, tmp_path):
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(256, (3, *size), generator=generator, dtype=torch.uint8)  # noise, the largest of files
        store = stseg.MaskStore()
        store["x"] = (image[0] > 127).byte() * 7
        image = image if dtype == torch.uint8 else image / 255
        data = stseg.PseudoLabeled([image], store, indices=[0], ids=["x"])
        text = draw_galleries([Gallery("", "", [Picture(data, 0, "t", "s")])], ignore_index=255, class_name=str)
        assert len(text) < 130_000  # 24 pictures are below 3 MB, of noise
        path = tmp_path / "page.html"
        path.write_text(f"<!doctype html>\n<html>{text}</html>")
        shape = Page(path).picture("image x").shape[:2]
        assert max(shape) in ((400, 320, 240) if max(size) > 400 else (1,))
        assert shape[0] <= shape[1] or size == (700, 600)


def predicted(model, val, num_classes, config=None, *, with_mask=True):
    config = config or stseg.TrainConfig(steps=1, batch_size=2)
    model = as_segmenter(model)
    return predict_pictures(model, Items.of(val), num_classes, config, with_mask=with_mask, progress=False)


def pixels_of(address):
    return np.asarray(Image.open(io.BytesIO(b64decode(address.split(",", 1)[1]))))


@pytest.mark.usefixtures("no_curves")
class TestPredictions:
    def test_of_validation_images_are_those_of_the_final_network_the_worst_first(self, finished):
        result, folder = finished
        page = Page(folder / "report.html")
        scores = stseg.evaluate(result.model, held_out(), num_classes=2, per_image=True, progress=False)
        shown = [f"{id}\nmean IoU {100 * miou:.1f} %\n" for id, miou in scores.worst_images()]
        assert "predicts for 3 images, the worst one first, by the mean IoU over the classes in each." in page.text
        assert [page.text.index(text) for text in shown] == sorted(page.text.index(text) for text in shown)
        with torch.no_grad():
            for id, (image, mask) in enumerate(held_out()):
                expected = result.model(image[None]).argmax(1)[0]
                assert np.array_equal(page.picture(f"prediction for {id}")[..., :3], COLORS[expected.numpy()])
                assert np.array_equal(page.picture(f"true mask of {id}")[..., :3], COLORS[mask.numpy()])

    def test_of_many_are_the_worst_and_the_best_of_evenly_spaced_ones(self, monkeypatch, tmp_path):
        generator = torch.Generator().manual_seed(3)
        val = [(image, (image[0] > 0.5).byte()) for image in torch.rand(30, 3, 4, 4, generator=generator)]
        model = nn.Conv2d(3, 2, 1)
        scores = stseg.evaluate(model, val, num_classes=2, per_image=True, progress=False).worst_images(30)
        found = predicted(model, val, 2)
        assert [one.id for one in found.images] == [id for id, _ in [*scores[:8], *scores[-4:]]]
        assert (found.compared, found.total) == (30, 30)
        monkeypatch.setattr(predictions, "_MOST_COMPARED", 15)
        found = predicted(model, val, 2)
        assert {int(one.id) % 2 for one in found.images} == {0}
        assert found == predicted(model, val, 2)
        summarized = dataclasses.replace(of({"step": 1.0}, [1, 1]), predictions=found, data={}, folder=tmp_path)
        monkeypatch.setattr(report, "read_run", lambda *_: summarized)
        text = Page(stseg.write_report(tmp_path)).text
        assert "for the worst and the best of 15 images (evenly spaced among 30), by the mean IoU" in text
        best = [one.id for one in found.images[8:]][::-1]
        shown = [f"\n{id}\nmean IoU" for id in best]
        after = text[text.index("The best") :]
        assert [after.index(text) for text in shown] == sorted(after.index(text) for text in shown)

    def test_ignored_pixels_do_not_count_and_have_no_color_in_the_true_mask(self):
        image, mask = torch.zeros(3, 2, 2), torch.tensor([[0, 1], [255, 255]], dtype=torch.uint8)
        nothing = (image, torch.full((2, 2), 255, dtype=torch.uint8))
        found = predicted(Constant(), [(image, mask), nothing], 2)
        (one,) = found.images
        assert one.iou == 0.25
        assert one.values == (0, 1, 255)
        assert pixels_of(one.truth)[..., 3].tolist() == [[255, 255], [0, 0]]
        assert (pixels_of(one.prediction)[..., 3] == 255).all()

    @pytest.mark.parametrize("channels", [1, 2, 3, 5])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
    @pytest.mark.parametrize(("classes", "logits"), [(2, 1), (2, 2), (300, 300)])
    def test_of_any_images_classes_and_sizes(self, channels, dtype, classes, logits):
        sizes = [(4, 6), (1, 1), (500, 7), (4, 6)]
        images = [torch.rand(channels, *size) for size in sizes]
        images = [(255 * image).byte() if dtype == torch.uint8 else image for image in images]
        kind = torch.uint8 if classes < 255 else torch.int32
        val = [(image, torch.randint(classes, image.shape[1:], dtype=kind)) for image in images]
        config = stseg.TrainConfig(steps=1, batch_size=2, weak=None, ignore_index=255 if classes < 255 else -1)
        found = predicted(nn.Conv2d(channels, logits, 1), val, classes, config)
        assert sorted(one.size for one in found.images) == sorted(sizes)
        for one in found.images:
            scale = min(1, 320 / max(one.size))
            assert pixels_of(one.image).shape[:2] == tuple(max(1, round(side * scale)) for side in one.size)
            assert max(one.values) < classes

    def test_without_validation_are_of_unlabeled_images(self, tmp_path):
        result = run(lambda make: stseg.methods.FixMatch(make()), tmp_path)
        page = Page(tmp_path / "report.html")
        assert "predictions-on-unlabeled-images" in page.ids
        assert {f"prediction for {id}" for id in IDS} < set(page.pictures)
        assert not any("true mask" in alt for alt in page.pictures)
        assert "predicts for 4 images." in page.text
        assert [one.iou for one in result.predictions.images] == [None] * 4
        assert len(predicted(nn.Conv2d(3, 2, 1), list(torch.rand(29, 3, 4, 4)), 2, with_mask=False).images) == 10

    def test_without_any_images_it_says_how_to_get_them(self, tmp_path):
        result = trainer("supervised", tmp_path).fit(drawn()[0])
        assert result.predictions is None
        assert "a run of stseg.SelfTrainer with val=... makes them at its end." in Page(tmp_path / "report.html").text

    def test_are_kept_and_made_again_only_for_another_network(self, tmp_path, monkeypatch):
        first = run("supervised", tmp_path, val=held_out())
        page, file = Page(tmp_path / "report.html"), tmp_path / "predictions.json"
        kept = file.read_bytes()
        assert run("supervised", tmp_path, val=held_out()).predictions == first.predictions  # all was done
        shutil.rmtree(tmp_path / "teacher")
        (tmp_path / "report.html").unlink()
        file.write_text("{}")
        with pytest.raises(stseg.DamagedFileError, match=r"predictions\.json is damaged"):
            stseg.write_report(tmp_path, tmp_path / "elsewhere")
        assert run("supervised", tmp_path, val=held_out()).predictions == first.predictions
        assert file.read_bytes() == kept
        (tmp_path / "report.html").unlink()
        monkeypatch.setattr(stages, "predict_pictures", None)
        run("supervised", tmp_path, val=held_out())
        assert Page(tmp_path / "report.html").pictures == page.pictures
        assert Page(stseg.write_report(first, tmp_path / "elsewhere")).pictures == page.pictures
        assert read_predictions(tmp_path, "another") is None
        summary.read_record(file)
        stseg.storage.records.write_record(file, {"images": [{}]})
        with pytest.raises(stseg.DamagedFileError, match="is not a record of predictions"):
            stseg.write_report(tmp_path)

    def test_that_fail_end_no_run(self, tmp_path, monkeypatch, caplog):
        def fail(*_, **__):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(stages, "predict_pictures", fail)
        result = run("supervised", tmp_path, val=held_out())
        assert result.predictions is None
        assert "the report has no pictures of predictions: RuntimeError: out of memory" in caplog.text
        assert "There are no pictures of predictions" in Page(tmp_path / "report.html").text

    def test_leave_the_network_and_the_generators_as_they_were(self):
        model, before = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Dropout(0.5)).train(), torch.get_rng_state()
        predicted(model, held_out(), 2)
        assert model.training
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("no_curves")
class TestRanking:
    def test_the_cut_and_the_ends_are_those_of_the_run(self, finished):
        result, folder = finished
        page = Page(folder / "report.html")
        cut = (result.ranking.scores[1] + result.ranking.scores[2]) / 2
        assert any(f"the cut between reliable and unreliable is at {cut:.3f}" in label for label in page.labels)
        rows = page.tables["Both ends of the ranking"]
        assert rows[0] == ["Place", "Image", "Stability", "Part"]
        assert [row[1] for row in rows[1:]] == list(result.ranking.ids)
        assert [row[3] for row in rows[1:]] == ["reliable"] * 2 + ["unreliable"] * 2

    def test_the_file_is_linked(self, finished, tmp_path):
        result, folder = finished
        assert "ranking/ranking.csv" in Page(folder / "report.html").links
        path = stseg.write_report(folder, tmp_path / "with space")
        (link,) = (link for link in Page(path).links if link.endswith(".csv"))
        assert "%20" in link
        assert (path.parent / unquote(link)).resolve() == (folder / "ranking" / "ranking.csv").resolve()
        assert not any(link.endswith(".csv") for link in Page(stseg.write_report(result, tmp_path)).links)

    def test_by_confidence_is_called_so(self, tmp_path):
        ranker = stseg.ConfidenceRanker(nn.Conv2d(3, 2, 1), num_classes=2, progress=False)
        run(STPlusPlus(ranker=ranker, labeling=Labeling(tta=None)), tmp_path)
        text = Page(tmp_path / "report.html").text
        assert "The most confident" in text
        assert "mean confidence 0." in text


class TestFromAFolder:
    def test_it_tells_what_the_result_tells(self, finished, tmp_path):
        result, folder = finished
        one = Page(stseg.write_report(folder, tmp_path / "one", images=drawn()[1]))
        other = Page(folder / "report.html")
        assert one.tables.keys() == other.tables.keys()
        for caption, rows in other.tables.items():
            assert one.tables[caption] == rows, caption
        assert one.pictures == other.pictures
        assert one.labels == other.labels
        told, known = read_run(folder), summarize_result(result, folder)
        assert told.reliable == known.reliable == 2
        assert [dict(row) for row in told.trainings["teacher"].history] == list(result.stages["teacher"].history)

    @pytest.mark.usefixtures("no_curves")
    def test_without_images_it_says_how_to_show_them(self, finished, tmp_path):
        page = Page(stseg.write_report(finished[1], tmp_path))
        assert not any("pseudo-mask" in alt for alt in page.pictures)
        assert "write_report(workdir, images=unlabeled)" in page.text

    @pytest.mark.usefixtures("no_curves")
    def test_it_is_written_into_the_folder_of_a_finished_run(self, tmp_path):
        run("supervised", tmp_path)
        (tmp_path / "report.html").unlink()
        assert stseg.write_report(str(tmp_path), class_names=["a", "b"]) == tmp_path / "report.html"
        assert stseg.load(tmp_path, nn.Conv2d(3, 2, 1)) is not None

    @pytest.mark.usefixtures("no_curves")
    def test_of_fit(self, tmp_path):
        labeled, _ = drawn()
        config = stseg.TrainConfig(steps=3, batch_size=2, weak=None)
        result = stseg.fit(nn.Conv2d(3, 2, 1), labeled, config, val=held_out(), workdir=tmp_path, progress=False)
        page = Page(stseg.write_report(tmp_path))
        assert f"{100 * result.history[-1]['miou']:.1f} %\nmean IoU on 3 validation images\n" in page.text
        assert "Supervised" in page.text
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(stseg.DataError, match="is not finished"):
            stseg.write_report(tmp_path)

    @pytest.mark.usefixtures("no_curves")
    def test_of_a_run_under_way_goes_elsewhere(self, finished, tmp_path):
        folder = shutil.copytree(finished[1], tmp_path / "run")
        shutil.rmtree(folder / "ranking")
        (folder / "report.html").unlink()
        (folder / "student-2" / "model.safetensors").unlink()
        record = summary.read_record(folder / "run.json")
        del record["finished"], record["steps"]["student-2"], record["steps"]["ranking"]
        stseg.storage.records.write_record(folder / "run.json", record)
        with pytest.raises(stseg.DataError, match=r"run is not finished; expected another folder") as error:
            stseg.write_report(folder)
        assert str(folder) in str(error.value)
        page = Page(stseg.write_report(folder, tmp_path / "so far"))
        assert "of a run under way" in page.text
        assert "student-2" in page.text
        (folder / "student-2" / "history.jsonl").unlink()
        assert "No mIoU yet: student-2 has just begun." in Page(stseg.write_report(folder, tmp_path / "so far")).text
        assert not (folder / "report.html").exists()

    @pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"step": "a", "seconds": 1}', '{"step": 1, "seconds": null}'])
    def test_a_history_that_is_damaged_is_named(self, tmp_path, line):
        labeled, _ = drawn()
        config = stseg.TrainConfig(steps=3, batch_size=2, weak=None)
        stseg.fit(nn.Conv2d(3, 2, 1), labeled, config, workdir=tmp_path, progress=False)
        (tmp_path / "model.safetensors").unlink()
        with open(tmp_path / "history.jsonl", "a") as file:
            file.write(line + "\n")
        with pytest.raises(stseg.DamagedFileError, match=r"history\.jsonl is damaged: line 4 is no row of a history"):
            stseg.write_report(tmp_path, tmp_path / "report")

    @pytest.mark.usefixtures("no_curves")
    def test_files_that_are_damaged_are_named(self, finished, tmp_path):
        folder = shutil.copytree(finished[1], tmp_path / "run")
        mask = next(path for path in (folder / "reliable" / "masks").rglob("*.png"))
        mask.write_bytes(mask.read_bytes()[:-30])
        with pytest.raises(stseg.DamagedFileError, match=r"masks/.*\.png cannot be read"):
            stseg.write_report(folder)
        ranking = folder / "ranking" / "ranking.csv"
        ranking.write_text(ranking.read_text().replace("0.", "0.1", 1))
        with pytest.raises(stseg.DamagedFileError, match=r"ranking\.csv is damaged"):
            stseg.write_report(folder)
        (folder / "run.json").write_text("{}")
        with pytest.raises(stseg.DamagedFileError, match=r"run\.json is damaged"):
            stseg.write_report(folder)

    @pytest.mark.usefixtures("no_curves")
    def test_images_that_are_not_those_of_the_run_are_refused(self, finished, tmp_path):
        _, unlabeled = drawn()
        with pytest.raises(stseg.DataError, match=r"the images have no item .*, whose mask is in .*reliable/masks"):
            stseg.write_report(finished[1], tmp_path, images=unlabeled[:2])
        others = Named([1 - image for image in unlabeled], IDS)
        with pytest.raises(stseg.DamagedFileError, match="is the mask of another image"):
            stseg.write_report(finished[1], tmp_path, images=others)

    def test_a_folder_that_is_no_run_is_named(self, finished, tmp_path):
        with pytest.raises(stseg.DataError, match="none does not exist"):
            stseg.write_report(tmp_path / "none")
        with pytest.raises(
            stseg.DataError, match=r"is not a work directory: it has neither run\.json nor stage\.json$"
        ):
            stseg.write_report(tmp_path)
        with pytest.raises(stseg.DataError, match="expected one of the runs in it: 'first & best'"):
            stseg.write_report(finished[1].parent)

    @pytest.mark.parametrize(
        ("arguments", "options", "error", "message"),
        [
            ((None, "x"), {}, TypeError, "run is NoneType; expected the result of SelfTrainer.fit, or the folder"),
            ((FitResult(nn.Conv2d(3, 2, 1), (), (), 0.0), "x"), {}, TypeError, "run is FitResult"),
            (("", "x"), {}, ValueError, "is an empty string; expected a folder"),
            (("result",), {}, ValueError, "folder is None; expected the folder of the report"),
            (("result", "x"), {"images": []}, ValueError, "images go with a work directory"),
            (("result", "x"), {"title": 3}, TypeError, "title is 3; expected a text"),
        ],
    )
    def test_wrong_arguments(self, finished, arguments, options, error, message):
        arguments = [finished[0] if each == "result" else each for each in arguments]
        with pytest.raises(error, match=message):
            stseg.write_report(*arguments, **options)


@pytest.mark.usefixtures("no_curves")
class TestSettings:
    def test_show_a_method_by_its_name_and_settings(self, tmp_path):
        labeled, unlabeled = drawn()
        made = stseg.methods.create_method("fixmatch", num_classes=2, threshold=0.9)
        trainer(made, tmp_path).fit(labeled, unlabeled)
        page = Page(tmp_path / "report.html")
        rows = dict(page.tables["Settings"][1:])
        assert rows["method"] == "FixMatch"
        assert rows["method.threshold"] == "0.9"
        assert rows["config.weak"] == "WeakAugment"
        assert rows["config.weak.crop_size"] == "[16, 16]"
        for internal in ("_Named", "_Kind", "OneStage", "method.method", "networks", "takes_classes"):
            assert internal not in page.source

    def test_of_a_recipe_are_its_own(self, finished):
        rows = dict(Page(finished[1] / "report.html").tables["Settings"][1:])
        assert rows["method"] == "STPlusPlus"
        assert rows["method.reliable_fraction"] == "0.5"

    def test_before_the_first_training_show_no_internals(self):
        method = {"type": "OneStage", "method": {"type": "_Named", "kind": {}, "settings": {"threshold": 0.9}}}
        told = dataclasses.replace(of({}, []), settings={"method": method, "num_classes": 2}, trainings={})
        assert show_settings(told) == {"num_classes": "2"}


def test_html_is_escaped_once():
    assert escape(escape("<")) == "&lt;"
    assert element("p", "a & b", Html("<b>"), kind='"') == '<p class="&quot;">a &amp; b<b></p>'
    assert escape("\0") == "\\x00"


def test_a_caption_is_not_as_narrow_as_its_table(finished):
    assert (
        "table { border-collapse: collapse; font-size: .93rem; min-width: min(100%, 26rem) }"
        in Page(finished[1] / "report.html").source
    )


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<!doctype html><body><iframe src="report.html" width="375" height="800"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, slider = page.getElementById("opacity");
  slider.value = 20; slider.dispatchEvent(new Event("input"));
  const images = [...page.images];
  images.forEach(image => image.loading = "eager");
  const mask = page.querySelector(".overlay img + img"), opacity = frame.contentWindow.getComputedStyle(mask).opacity;
  Promise.all(images.map(image => image.decode())).then(() => {
    const fits = page.documentElement.scrollWidth <= page.documentElement.clientWidth;
    const low = [...page.querySelectorAll("caption")].every(caption => caption.offsetHeight < 70);
    document.title = `${fits} ${opacity} ${images.every(image => image.naturalWidth > 0)} ${low}`;
  });
};
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_in_a_browser_the_page_fits_a_phone_and_the_slider_works(finished, tmp_path):
    shutil.copy(finished[1] / "report.html", tmp_path / "report.html")
    (tmp_path / "look.html").write_text(LOOK)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"]
    done = subprocess.run([*command, (tmp_path / "look.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "<title>true 0.2 true true</title>" in done.stdout, done.stdout[-400:]
