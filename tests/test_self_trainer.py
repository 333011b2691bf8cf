from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import Entropic, same
from torch import nn

import stseg
from stseg import DamagedFileError, DataError, Ranking, SelfTrainer, TrainConfig, WeakAugment, WorkdirMismatchError, fit
from stseg.engine.step import TrainingSteps
from stseg.functional import ohem_cross_entropy
from stseg.inference import sweep
from stseg.methods import ST, Baseline, Labeling, STPlusPlus, Supervised
from stseg.methods.st import thirds
from stseg.seeds import derive_seed
from stseg.storage.records import read_record, write_record

SEED = 5
NORMAL = [torch.tensor(v)[:, None, None] for v in (stseg.IMAGENET_MEAN, stseg.IMAGENET_STD)]


class Named(list):
    """Items with ids."""

    def __init__(self, items, prefix: str) -> None:
        super().__init__(items)
        self.ids = [f"{prefix}/{index}" for index in range(len(self))]


def images(count: int, seed: int, size: tuple[int, int] = (20, 24)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [F.interpolate(torch.rand(1, 3, 5, 6, generator=generator), size)[0] for _ in range(count)]


def labeled(count: int = 3, seed: int = 1, prefix: str = "labeled") -> Named:
    return Named([(image, (image[0] > 0.5).byte() + (image[1] > 0.7)) for image in images(count, seed)], prefix)


def unlabeled(count: int = 5) -> Named:
    return Named([*images(count - 1, 2), *images(1, 3, (17, 30))], "unlabeled")


def make_model() -> nn.Module:
    first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1))


WEAK = WeakAugment(16, base_size=24)
CONFIG = TrainConfig(epochs=4, batch_size=3, weak=WEAK, lr=0.05, seed=SEED)


def trainer(**options) -> SelfTrainer:
    options = {"num_classes": 3, "config": CONFIG, "progress": False, **options}
    return SelfTrainer(options.pop("make_model", make_model), **options)


def own(make_model):
    """Makes a method of a user's own."""
    return Entropic(make_model())


class Mixture(list):
    """What a stage learns from: L as often as makes it about as large as the rest, then the rest."""

    def __init__(self, true, guessed) -> None:
        rounds = math.ceil(len(guessed) / len(true)) if guessed else 2  # fewer than 200: twice
        super().__init__([(*item, False) for item in true] * rounds + [(*item, True) for item in guessed])


def train_by_hand(
    step: str, true, guessed=(), *, start: nn.Module | None = None, config: TrainConfig = CONFIG, **options
) -> tuple[nn.Module, list[nn.Module]]:
    """A stage on its own: fresh weights (or those of another network), and the seed of that step."""
    torch.manual_seed(derive_seed(SEED, "init", step))
    network = make_model() if start is None else copy.deepcopy(start)
    result = fit(
        Supervised(network, strong=stseg.StrongAugment() if guessed else None, **options),
        Mixture(true, guessed),
        config.with_seed(derive_seed(SEED, step)),
        snapshots=[4 // 3, 2 * 4 // 3, 4],
        progress=False,
    )
    return result.model.network, [snapshot.network for snapshot in result.snapshots]


def mask_by_hand(network: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return labels_by_hand(network, image)[0]


@torch.no_grad()
def labels_by_hand(network: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and confidence of one image: five scales, each with its mirror image."""
    height, width = image.shape[-2:]
    total = torch.zeros(3, height, width)
    for scale in (0.5, 0.75, 1.0, 1.5, 2.0):
        size = (int(height * scale), int(width * scale))
        view = F.interpolate(image[None], size, mode="bilinear", align_corners=True)
        for mirrored in (False, True):
            x = view.flip(-1) if mirrored else view
            p = network((x - NORMAL[0]) / NORMAL[1]).softmax(1)
            p = p.flip(-1) if mirrored else p
            total += F.interpolate(p, (height, width), mode="bilinear", align_corners=True)[0]
    return total.argmax(0).to(torch.uint8), total.amax(0) / total.sum(0)


@torch.no_grad()
def stability_by_hand(networks: list[nn.Module], image: torch.Tensor) -> float:
    masks = [network(((image - NORMAL[0]) / NORMAL[1])[None]).argmax(1)[0].numpy() for network in networks]
    scores = []
    for mask in masks[:-1]:
        ious = []
        for k in range(3):
            either = ((mask == k) | (masks[-1] == k)).sum()
            if either:
                ious.append(((mask == k) & (masks[-1] == k)).sum() / either)
        scores.append(np.mean(ious))
    return float(np.mean(scores))


class TestAgainstTheSameByHand:
    def test_supervised(self):
        result = trainer(method="supervised").fit(labeled())
        assert same(result.model.network, train_by_hand("teacher", labeled())[0])
        assert list(result.stages) == ["teacher"]
        assert result.labels == {}

    def test_st(self):
        result = trainer(method="st").fit(labeled(), unlabeled())
        teacher, _ = train_by_hand("teacher", labeled())
        labels = [mask_by_hand(teacher, image) for image in unlabeled()]
        assert all(torch.equal(mask, own) for (_, mask), own in zip(result.labels["labels"], labels, strict=True))
        student, _ = train_by_hand("student", labeled(), list(zip(unlabeled(), labels, strict=True)))
        assert same(result.model.network, student)

    def test_st_plus_plus(self):
        result = trainer().fit(labeled(), unlabeled())
        data = unlabeled()
        teacher, checkpoints = train_by_hand("teacher", labeled())
        scores = [stability_by_hand(checkpoints, image) for image in data]
        order = sorted(range(5), key=lambda index: -scores[index])
        assert result.ranking.indices == tuple(order)
        assert result.ranking.scores == pytest.approx([scores[i] for i in order], abs=1e-12)
        easy = [(data[i], mask_by_hand(teacher, data[i])) for i in order[:2]]
        student, _ = train_by_hand("student-1", labeled(), easy)
        hard = [(data[i], mask_by_hand(student, data[i])) for i in order[2:]]
        final, _ = train_by_hand("student-2", labeled(), easy + hard)
        for name, pairs in (("reliable", easy), ("unreliable", hard)):
            assert all(torch.equal(mask, own) for (_, mask), (_, own) in zip(result.labels[name], pairs, strict=True))
        assert same(result.model.network, final)
        assert same(result.stages["student-1"].model.network, student)


class TestBeyondThePaper:
    def test_pseudo_weight(self):
        result = trainer(method=ST(pseudo_weight=0.25)).fit(labeled(), unlabeled())
        teacher, _ = train_by_hand("teacher", labeled())
        guessed = [(image, mask_by_hand(teacher, image)) for image in unlabeled()]
        student, _ = train_by_hand("student", labeled(), guessed, pseudo_weight=0.25)
        assert same(result.stages["teacher"].model.network, teacher)
        assert same(result.model.network, student)
        assert not same(student, train_by_hand("student", labeled(), guessed)[0])

    @pytest.mark.parametrize("threshold", [0.4, (0.38, 0.42, 0.4)])
    def test_threshold(self, threshold):
        result = trainer(method=ST(labeling=Labeling(threshold=threshold))).fit(labeled(), unlabeled())
        teacher, _ = train_by_hand("teacher", labeled())
        guessed = []
        for image in unlabeled():
            mask, confidence = labels_by_hand(teacher, image)
            least = torch.tensor(threshold)[mask.long()] if isinstance(threshold, tuple) else threshold
            guessed.append((image, torch.where(confidence < least, 255, mask).to(torch.uint8)))
        pixels = torch.cat([mask.flatten() for _, mask in guessed])
        assert 0.05 < (pixels == 255).float().mean() < 0.95
        for (_, mask), (_, own) in zip(result.labels["labels"], guessed, strict=True):
            assert torch.equal(mask, own)
        assert same(result.model.network, train_by_hand("student", labeled(), guessed)[0])

    def test_keep_per_class_at_each_labeling(self):
        keep, data = 0.7, unlabeled()
        result = trainer(method=STPlusPlus(labeling=Labeling(keep_per_class=keep))).fit(labeled(), data)
        teacher, _ = train_by_hand("teacher", labeled())
        reliable, rest = result.ranking.split(0.5)

        def label(network: nn.Module, indices: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
            chosen = [data[index] for index in indices]
            views = stseg.MultiScaleFlip(network)
            thresholds = stseg.PseudoLabeler(views, num_classes=3, progress=False).class_thresholds(chosen, keep)
            return list(stseg.PseudoLabeler(views, num_classes=3, threshold=thresholds, progress=False).label(chosen))

        easy = label(teacher, reliable)
        student, _ = train_by_hand("student-1", labeled(), easy)
        hard = label(student, rest)
        for name, own in (("reliable", easy), ("unreliable", hard)):
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(result.labels[name], own, strict=True))
        assert same(result.model.network, train_by_hand("student-2", labeled(), easy + hard)[0])
        # And the share itself, counted: the least certain pixels of each class are those that are left out.
        for network, pairs in ((teacher, easy), (student, hard)):
            found = [labels_by_hand(network, image) for image, _ in pairs]
            classes, confidence = (torch.cat([part[i].flatten() for part in found]) for i in range(2))
            kept = torch.cat([mask.flatten() for _, mask in pairs]) != 255
            for of_class in classes.unique():
                own = classes == of_class
                assert keep <= kept[own].float().mean() <= keep + 0.02 + 1 / own.sum()
                low, high = confidence[own & ~kept], confidence[own & kept]
                assert not len(low) or low.max() <= high.min() + 1e-5

    def test_keep_per_class_of_one_is_the_paper(self):
        kept = trainer(method=STPlusPlus(labeling=Labeling(keep_per_class=1))).fit(labeled(), unlabeled())
        assert same(kept.model, trainer().fit(labeled(), unlabeled()).model)

    def test_student_init_teacher_in_st(self):
        result = trainer(method=ST(student_init="teacher")).fit(labeled(), unlabeled())
        teacher, _ = train_by_hand("teacher", labeled())
        guessed = [(image, mask_by_hand(teacher, image)) for image in unlabeled()]
        assert same(result.model.network, train_by_hand("student", labeled(), guessed, start=teacher)[0])
        assert same(result.stages["teacher"].model.network, teacher), "the teacher itself was trained further"

    def test_student_init_teacher_in_st_plus_plus_is_the_network_that_labeled_last(self):
        data = unlabeled()
        result = trainer(method=STPlusPlus(student_init="teacher")).fit(labeled(), data)
        teacher, _ = train_by_hand("teacher", labeled())
        reliable, rest = result.ranking.split(0.5)
        easy = [(data[i], mask_by_hand(teacher, data[i])) for i in reliable]
        student, _ = train_by_hand("student-1", labeled(), easy, start=teacher)
        hard = [(data[i], mask_by_hand(student, data[i])) for i in rest]
        final, _ = train_by_hand("student-2", labeled(), easy + hard, start=student)
        assert same(result.stages["student-1"].model.network, student)
        assert same(result.model.network, final)

    @pytest.mark.parametrize("method", [ST, STPlusPlus])
    def test_student_init_teacher_with_a_teacher_that_is_handed_in(self, method, tmp_path):
        teacher = trainer(method="supervised").fit(labeled()).stages["teacher"]
        before = copy.deepcopy(teacher.model)
        options = {"method": method(student_init="teacher")}
        handed = trainer(**options, workdir=tmp_path).fit(labeled(), unlabeled(), teacher=teacher)
        assert same(teacher.model, before)
        assert same(handed.model, trainer(**options).fit(labeled(), unlabeled()).model)
        again = trainer(**options, workdir=tmp_path).fit(labeled(), unlabeled(), teacher=teacher)
        assert same(again.model, handed.model)

    def test_student_init_teacher_needs_a_teacher_of_the_same_kind(self):
        other = fit(nn.Conv2d(3, 3, 1), labeled(), CONFIG, snapshots=[1, 4], progress=False)
        for method in (ST, STPlusPlus):
            with pytest.raises(
                ValueError, match="student_init is 'teacher', but its weights do not fit the network of"
            ):
                trainer(method=method(student_init="teacher")).fit(labeled(), unlabeled(), teacher=other)

    def test_pseudo_masks_of_which_nothing_is_left_are_no_nan(self):
        result = trainer(method=STPlusPlus(labeling=Labeling(threshold=1.0))).fit(labeled(), unlabeled())
        masks = [mask for name in ("reliable", "unreliable") for _, mask in result.labels[name]]
        assert all((mask == 255).all() for mask in masks)
        assert all(value.isfinite().all() for value in result.model.state_dict().values())
        assert all(math.isfinite(row["loss"]) for row in result.stages["student-2"].history)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"threshold": 1.5}, r"threshold is 1.5; expected a probability in \[0, 1\]"),
            ({"threshold": [0.5, 0.5]}, r"threshold is .*0.5, 0.5.*; expected .* one for each of 3 classes"),
            ({"threshold": [0.5, math.nan, 0.5]}, "threshold of class 1 is nan"),
            ({"keep_per_class": 0}, r"keep_per_class is 0; expected a share in \(0, 1\], or None"),
            ({"keep_per_class": 1.5}, "keep_per_class is 1.5; expected a share"),
            ({"keep_per_class": math.nan}, "keep_per_class is nan; expected a share"),
            (
                {"keep_per_class": 0.5, "threshold": 0.3},
                "threshold is .*0.3.* and keep_per_class 0.5; expected one of the two",
            ),
        ],
    )
    def test_labelings_that_make_no_sense_are_named_at_once(self, options, message):
        for method in (ST, STPlusPlus):
            with pytest.raises(ValueError, match=message):
                trainer(method=method(labeling=Labeling(**options)))

    @pytest.mark.parametrize("options", [{"keep_per_class": 0.5}, {"threshold": 0.5}])
    def test_pixels_left_out_need_an_ignore_index_that_masks_on_disk_can_hold(self, options, tmp_path):
        config = TrainConfig(epochs=4, weak=WeakAugment(16, ignore_index=-1), ignore_index=-1)
        plain = {"config": config, "method": ST(strong=None, labeling=Labeling(**options))}
        with pytest.raises(ValueError, match=r"ignore_index is -1; .* 0\.\.65535"):
            trainer(workdir=tmp_path, **plain)
        trainer(**plain)

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (
                lambda: ST(student_init="student"),
                ValueError,
                "student_init is 'student'; expected 'fresh' or 'teacher'",
            ),
            (lambda: STPlusPlus(student_init="x"), ValueError, "student_init is 'x'; expected 'fresh' or 'teacher'"),
            (lambda: STPlusPlus(reliable_fraction=0), ValueError, "reliable_fraction is 0; expected a share between 0"),
            (lambda: STPlusPlus(reliable_fraction=1.0), ValueError, "reliable_fraction is 1.0; expected a share"),
            (lambda: STPlusPlus(reliable_fraction=math.nan), ValueError, "reliable_fraction is nan; expected a share"),
            (
                lambda: STPlusPlus(ranker=42),
                TypeError,
                "ranker is 42; expected None or an object with the method 'rank'",
            ),
            (lambda: STPlusPlus(ranker="stability"), TypeError, "ranker is 'stability'"),
            (lambda: Labeling(tta="flip"), TypeError, "tta is 'flip'; expected a function"),
            (lambda: ST(pseudo_weight=-1), ValueError, "pseudo_weight is -1; expected 0 or more"),
            (lambda: ST(pseudo_weight="1"), TypeError, "pseudo_weight is '1'; expected a number"),
            (lambda: Baseline(double_below=-1), ValueError, "double_below is -1; expected 0 or more"),
            (lambda: ST(labeling="flip"), TypeError, "labeling is 'flip'; expected a Labeling"),
            (lambda: Baseline(teacher="fixmatch"), TypeError, "teacher is 'fixmatch'; expected a function make_model"),
            (
                lambda: ST(student=Supervised(make_model())),
                TypeError,
                "student is Supervised; expected a function make_",
            ),
            (
                lambda: ST(student=Supervised),
                TypeError,
                "student is the class Supervised; expected a function make_model",
            ),
        ],
    )
    def test_recipes_refuse_nonsense_at_once(self, make, error, message):
        with pytest.raises(error, match=message):
            make()


class TestThirds:
    @pytest.mark.parametrize("length", [3, 4, 5, 80, 240, 1000])
    def test_are_those_of_the_paper(self, length):
        assert thirds(length) == [length // 3, 2 * length // 3, length]

    @pytest.mark.parametrize("config", [TrainConfig(epochs=5, weak=WEAK), TrainConfig(steps=5, weak=WEAK)])
    def test_are_kept_of_the_teacher_alone(self, config, tmp_path):
        trainer(config=config, workdir=tmp_path).fit(labeled(), unlabeled())
        kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("snapshots/*")}
        assert kept == {f"teacher/snapshots/{at}.safetensors" for at in (1, 3, 5)}

    def test_of_fewer_than_three_epochs_are_refused_for_st_plus_plus_alone(self):
        short = TrainConfig(epochs=2, batch_size=3, weak=WEAK)
        with pytest.raises(ValueError, match="keeps three checkpoints of the teacher; expected 3 epochs"):
            trainer(config=short)
        trainer(config=short, method="st").fit(labeled(), unlabeled())


class TestTeacher:
    def test_may_come_from_an_earlier_run(self):
        supervised = trainer(method="supervised").fit(labeled())
        teacher = supervised.stages["teacher"]
        for method in ("st", "st++"):
            handed = trainer(method=method).fit(labeled(), unlabeled(), teacher=teacher)
            assert same(handed.model, trainer(method=method).fit(labeled(), unlabeled()).model)
            assert "teacher" not in handed.seconds
            assert handed.stages["teacher"] is teacher

    def test_best_trains_on_the_labels_of_the_best_weights(self):
        val = labeled(4, seed=9, prefix="val")
        wild = TrainConfig(epochs=12, batch_size=3, weak=WeakAugment(16), lr=1.0, seed=SEED)
        result = trainer(method="st", keep="best", config=wild).fit(labeled(), unlabeled(), val)
        for stage in result.stages.values():
            metric = stseg.evaluate(stage.model, val, num_classes=3, progress=False)
            assert metric.compute() == max(row["miou"] for row in stage.history)
        with pytest.raises(ValueError, match="keep='best' needs a validation set"):
            trainer(keep="best").fit(labeled(), unlabeled())

    def test_final_lets_validation_choose_nothing(self):
        val = labeled(4, seed=9, prefix="val")
        with_val = trainer(method="st").fit(labeled(), unlabeled(), val)
        assert same(with_val.model, trainer(method="st").fit(labeled(), unlabeled()).model)
        assert all("miou" in row for stage in with_val.stages.values() for row in stage.history)

    def test_without_snapshots_cannot_rank(self):
        teacher = fit(make_model(), labeled(), CONFIG, progress=False)
        with pytest.raises(ValueError, match="the teacher has 0, expected two or more"):
            trainer().fit(labeled(), unlabeled(), teacher=teacher)


class TestUnlabeled:
    def test_masks_behind_the_images_are_never_looked_at(self):
        class Tempting(Named):
            def __getitem__(self, index):
                return super().__getitem__(index), "not even a mask"

        with_masks = Tempting(list(unlabeled()), "unlabeled")
        assert same(trainer().fit(labeled(), with_masks).model, trainer().fit(labeled(), unlabeled()).model)

    def test_without_ids_are_numbered(self, tmp_path):
        result = trainer(workdir=tmp_path).fit(list(labeled()), list(unlabeled()))
        assert sorted(result.ranking.ids) == ["0", "1", "2", "3", "4"]

    def test_are_not_needed_for_supervised_alone(self):
        with pytest.raises(ValueError, match=r"STPlusPlus learns from unlabeled images; expected fit\("):
            trainer().fit(labeled())

    def test_of_which_none_would_be_reliable_are_refused(self):
        with pytest.raises(stseg.DataError, match=r"1 unlabeled images with reliable_fraction 0\.5"):
            trainer().fit(labeled(), Named(images(1, 2), "u"))


def test_any_ranker_may_take_the_place_of_stability():
    class Backwards:
        def rank(self, dataset):
            return Ranking.from_scores(list(range(len(dataset))), dataset.ids)

    result = trainer(method=STPlusPlus(ranker=Backwards(), reliable_fraction=0.4)).fit(labeled(), unlabeled())
    assert result.labels["reliable"].ids == ["unlabeled/4", "unlabeled/3"]
    assert result.labels["unreliable"].ids == ["unlabeled/2", "unlabeled/1", "unlabeled/0"]


@pytest.mark.parametrize("indices", [(0, 1, 1), (0, 5), (-1, 0)])
def test_a_ranker_that_names_images_that_are_not_there_is_refused(indices):
    class Wrong:
        def rank(self, dataset):
            return Ranking(indices, (0.5,) * len(indices), tuple(map(str, indices)))

    with pytest.raises(stseg.DataError, match=r"the ranker gives \d indices from .*; expected each of 0\.\.4"):
        trainer(method=STPlusPlus(ranker=Wrong())).fit(labeled(), unlabeled())


@pytest.mark.parametrize(
    ("scores", "ids", "message"),
    [
        ((0.5, 0.4), ("unlabeled/1", "unlabeled/0"), "the ranker calls image 0 'unlabeled/1', but it is 'unlabeled/0'"),
        ((0.4, 0.5), ("0", "1"), "the ranker has the score 0.4 before 0.5; expected finite scores, the highest first"),
        ((0.4, math.nan), ("0", "1"), "the ranker has the score 0.4 before nan"),
        ((math.inf, 0.5), ("unlabeled/0", "unlabeled/1"), "the ranker has the score inf before 0.5"),
    ],
)
def test_a_ranker_that_contradicts_itself_is_refused(scores, ids, message):
    class Wrong:
        def rank(self, dataset):
            return Ranking((0, 1), scores, ids)

    with pytest.raises(stseg.DataError, match=message):
        trainer(method=STPlusPlus(ranker=Wrong())).fit(labeled(), unlabeled())


def test_a_teacher_of_other_classes_is_refused():
    other = fit(nn.Conv2d(3, 4, 1), labeled(), CONFIG, snapshots=[1, 4], progress=False)
    with pytest.raises(stseg.NetworkError, match="gives 4 classes; num_classes is 3"):
        trainer().fit(labeled(), unlabeled(), teacher=other)


def test_labels_at_one_scale_where_asked_to():
    result = trainer(method=ST(labeling=Labeling(tta=None))).fit(labeled(), unlabeled())
    teacher, _ = train_by_hand("teacher", labeled())
    for image, mask in result.labels["labels"]:
        with torch.no_grad():
            assert torch.equal(mask, teacher(((image - NORMAL[0]) / NORMAL[1])[None]).argmax(1)[0].byte())


def test_make_model_must_make_a_fresh_network_each_time():
    network = make_model()
    with pytest.raises(ValueError, match="make_model returned the same parameters twice"):
        trainer(make_model=lambda: network).fit(labeled(), unlabeled())
    with pytest.raises(TypeError, match="make_model is a network; expected a function"):
        trainer(make_model=network)


def test_leaves_the_random_state_of_the_caller_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    trainer().fit(labeled(), unlabeled())
    assert torch.equal(torch.rand(3), expected)


def content(folder: Path) -> dict[str, str]:
    """What a run has computed: every file but those that hold times."""
    timed = {"run.json", "history.jsonl", "progress.json", "report.html"}
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in timed)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class TestWorkdir:
    def test_is_laid_out_as_documented(self, tmp_path):
        result = trainer(workdir=tmp_path).fit(labeled(), unlabeled())
        files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
        for step in ("teacher", "student-1", "student-2"):
            assert {f"{step}/model.safetensors", f"{step}/history.jsonl"} <= files
        assert {f"teacher/snapshots/{at}.safetensors" for at in (1, 2, 4)} <= files
        assert {"run.json", "ranking/ranking.csv", "report.html"} <= files
        for name in ("reliable", "unreliable"):
            masks = {f for f in files if f.startswith(f"{name}/masks/") and f.endswith(".png")}
            assert masks == {f"{name}/masks/{id}.png" for id in result.labels[name].ids}
        run = json.loads((tmp_path / "run.json").read_text())
        assert run["versions"]["torch"] == torch.__version__.split("+")[0]
        assert [step for step in run["steps"] if step != "check"] == list(result.seconds)
        assert Ranking.from_csv(tmp_path / "ranking" / "ranking.csv").ids == result.ranking.ids

    def test_gives_a_finished_run_back_without_work(self, tmp_path):
        first = trainer(workdir=tmp_path).fit(labeled(), unlabeled())
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
        again = trainer(workdir=tmp_path).fit(labeled(), unlabeled())
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == before
        assert same(first.model, again.model)
        assert first.ranking == again.ranking
        assert again.seconds == pytest.approx(first.seconds, abs=1e-3)
        for name, data in first.labels.items():
            assert data.ids == again.labels[name].ids

    @pytest.mark.parametrize(
        "removed", ["teacher", "ranking", "reliable", "student-1", "unreliable", "student-2", "report.html"]
    )
    def test_goes_on_from_the_first_step_that_is_missing(self, tmp_path, removed):
        steps = ["teacher", "ranking", "reliable", "student-1", "unreliable", "student-2", "report.html"]
        trainer(workdir=tmp_path).fit(labeled(), unlabeled())
        before = content(tmp_path)
        run = read_record(tmp_path / "run.json")
        for step in steps[steps.index(removed) :]:
            run["steps"].pop(step, None)
            for path in sorted((tmp_path / step).rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "report.html").unlink(missing_ok=True)
        write_record(tmp_path / "run.json", run)
        trainer(workdir=tmp_path).fit(labeled(), unlabeled())
        assert content(tmp_path) == before

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "st"}, r"method\.type is 'STPlusPlus' there and 'ST' now"),
            ({"config": CONFIG.with_seed(6)}, "config.seed is 5 there and 6 now"),
            ({"keep": "best"}, "keep is 'final' there and 'best' now"),
            ({"method": STPlusPlus(reliable_fraction=0.4)}, "method.reliable_fraction is 0.5 there and 0.4 now"),
            ({"method": STPlusPlus(strong=None)}, "method.strong is 'StrongAugment.*' there and None now"),
            (
                {"method": STPlusPlus(labeling=Labeling(tta=None))},
                "method.labeling.tta is '.*MultiScaleFlip' there and None now",
            ),
            (
                {"method": STPlusPlus(labeling=Labeling(threshold=0.5))},
                "method.labeling.threshold is 0.0 there and 0.5 now",
            ),
            (
                {"method": STPlusPlus(labeling=Labeling(keep_per_class=0.5))},
                "method.labeling.keep_per_class is None there and 0.5 now",
            ),
            ({"method": STPlusPlus(student_init="teacher")}, "method.student_init is 'fresh' there and 'teacher' now"),
            ({"method": STPlusPlus(pseudo_weight=2)}, "method.pseudo_weight is 1.0 there and 2 now"),
            (
                {"method": STPlusPlus(loss=ohem_cross_entropy)},
                "method.loss is None there and '.*ohem_cross_entropy.*'",
            ),
            ({"method": STPlusPlus(student=own)}, "method.student is None there and '.*own.*' now"),
            ({"make_model": lambda: nn.Conv2d(3, 3, 1)}, "network is '.*' there and '.*' now"),
        ],
    )
    def test_of_other_settings_is_refused_with_the_difference(self, tmp_path, options, message):
        trainer(workdir=tmp_path).fit(labeled(), unlabeled())
        before = content(tmp_path)
        with pytest.raises(WorkdirMismatchError, match=message):
            trainer(workdir=tmp_path, **options).fit(labeled(), unlabeled(), labeled(2, seed=9, prefix="val"))
        assert content(tmp_path) == before

    def test_of_a_run_beyond_the_paper_goes_on_to_the_same(self, tmp_path, monkeypatch):
        options = {"method": STPlusPlus(labeling=Labeling(keep_per_class=0.6), student_init="teacher")}
        trainer(workdir=tmp_path / "whole", **options).fit(labeled(), unlabeled())
        times, left = 0, 0

        def interrupted(function):
            def counted(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return counted

        # Once for each training step, and for each image that is ranked, labeled or looked at for its confidence.
        monkeypatch.setattr(TrainingSteps, "__call__", interrupted(TrainingSteps.__call__))
        monkeypatch.setattr(sweep, "check_finite", interrupted(sweep.check_finite))
        folder = tmp_path / "killed"
        while not (folder / "student-2" / "model.safetensors").exists():
            times, left = times + 1, 5
            with suppress(KeyboardInterrupt):
                trainer(workdir=folder, config=dataclasses.replace(CONFIG, save_every=0.0), **options).fit(
                    labeled(), unlabeled()
                )
        assert times > 5
        left = 1000  # the pictures of the report are made in one go
        trainer(workdir=folder, config=CONFIG, **options).fit(labeled(), unlabeled())
        assert content(folder) == content(tmp_path / "whole")
        assert {path.parent.name for path in folder.rglob("thresholds.json")} == {"reliable", "unreliable"}

    def test_of_thresholds_that_were_found_does_not_find_them_again(self, tmp_path, monkeypatch):
        first = trainer(method=ST(labeling=Labeling(keep_per_class=0.6)), workdir=tmp_path).fit(labeled(), unlabeled())
        monkeypatch.delattr(stseg.PseudoLabeler, "class_thresholds")
        again = trainer(method=ST(labeling=Labeling(keep_per_class=0.6)), workdir=tmp_path).fit(labeled(), unlabeled())
        assert same(first.model, again.model)
        record = json.loads((tmp_path / "labels" / "thresholds.json").read_text())
        of_masks = json.loads((tmp_path / "labels" / "masks" / "labels.json").read_text())
        assert (record["keep_per_class"], record["result"]) == (0.6, of_masks["threshold"])

    def test_with_damaged_or_foreign_thresholds_says_which_file(self, tmp_path):
        trainer(method=ST(labeling=Labeling(keep_per_class=0.6)), workdir=tmp_path).fit(labeled(), unlabeled())
        path = tmp_path / "labels" / "thresholds.json"
        record = read_record(path)
        for change, message in (
            ({"result": [0.1, 0.2]}, r"thresholds\.json is damaged"),
            ({"result": [0.1, 0.2, 7]}, r"thresholds\.json is damaged"),
            ({"result": None}, r"thresholds\.json is damaged"),
            ({"result": ["a", 0.2, 0.3]}, r"thresholds\.json is damaged"),
            ({"result": [0.1, 0.2, 0.3]}, "threshold is .* there and"),
            ({"model": "another"}, r"thresholds\.json was made .*: model is 'another' there and"),
            ({"keep_per_class": 0.9}, r"thresholds\.json was made .*: keep_per_class is 0.9 there and 0.6 now"),
        ):
            write_record(path, {**record, **change})
            with pytest.raises((stseg.DataError, WorkdirMismatchError), match=message):
                trainer(method=ST(labeling=Labeling(keep_per_class=0.6)), workdir=tmp_path).fit(labeled(), unlabeled())

    @pytest.mark.parametrize("student_init", ["fresh", "teacher"])
    def test_of_another_teacher_under_a_finished_student_is_refused(self, tmp_path, student_init):
        options = {"method": ST(student_init=student_init), "workdir": tmp_path}
        trainer(**options).fit(labeled(), unlabeled())
        path = tmp_path / "teacher" / "model.safetensors"
        trainer(method="supervised", workdir=tmp_path / "other", config=CONFIG.with_seed(7)).fit(labeled())
        shutil.copy(tmp_path / "other" / "teacher" / "model.safetensors", path)
        with pytest.raises(DamagedFileError, match=r"teacher/model\.safetensors was written by another training"):
            trainer(**options).fit(labeled(), unlabeled())

    def test_of_a_teacher_that_came_out_otherwise_names_each_step_to_make_again(self, tmp_path, monkeypatch):
        trainer(workdir=tmp_path).fit(labeled(), unlabeled())
        (tmp_path / "teacher" / "model.safetensors").unlink()
        with monkeypatch.context() as patched:  # as on another device
            patched.setattr(TrainingSteps, "__call__", _nudged(TrainingSteps.__call__))
            for step in ("ranking", "reliable/masks", "student-1", "unreliable/masks", "student-2"):
                with pytest.raises(WorkdirMismatchError, match=f"delete {tmp_path / step} to ") as caught:
                    trainer(workdir=tmp_path).fit(labeled(), unlabeled())
                assert str(caught.value).startswith(f"{tmp_path / step} was made with other settings or data: ")
                shutil.rmtree(tmp_path / step)
            again = trainer(workdir=tmp_path).fit(labeled(), unlabeled())
            fresh = trainer().fit(labeled(), unlabeled())
        assert again.ranking == fresh.ranking
        assert same(again.model, fresh.model)

    @pytest.mark.parametrize("cut", ["lines", "score", "everything", "index"])
    def test_with_a_damaged_ranking_says_which_file(self, tmp_path, cut):
        trainer(workdir=tmp_path).fit(labeled(), unlabeled())
        path = tmp_path / "ranking" / "ranking.csv"
        text = path.read_text()
        path.write_text(
            {
                "lines": "\n".join(text.split("\n")[:4]) + "\n",
                "score": text[: len(text) * 2 // 3],
                "everything": text.split("\n")[0] + "\n",
                "index": text.replace("\n0,", "\n99,"),
            }[cut]
        )
        with pytest.raises(stseg.DataError, match=r"ranking\.csv"):
            trainer(workdir=tmp_path).fit(labeled(), unlabeled())

    def test_of_a_network_with_other_random_weights_from_elsewhere_can_be_resumed(self, tmp_path):
        def from_numpy():
            network = make_model()
            network[0].weight.data = torch.from_numpy(np.random.randn(6, 3, 3, 3)).float()  # noqa: NPY002
            return network

        first = trainer(make_model=from_numpy, workdir=tmp_path).fit(labeled(), unlabeled())
        assert same(trainer(make_model=from_numpy, workdir=tmp_path).fit(labeled(), unlabeled()).model, first.model)

    @pytest.mark.parametrize("changed", ["labeled", "unlabeled", "validation"])
    def test_of_other_data_is_refused_with_the_difference(self, tmp_path, changed):
        data = {"labeled": labeled(), "unlabeled": unlabeled(), "validation": labeled(2, seed=9, prefix="v")}
        trainer(workdir=tmp_path).fit(*data.values())
        first = data[changed][0]
        data[changed][0] = (first[0].flip(-1), first[1].flip(-1)) if isinstance(first, tuple) else first.flip(-1)
        with pytest.raises(WorkdirMismatchError, match=f"{changed} is '.* items, .*' there and '.* items, .*' now"):
            trainer(workdir=tmp_path).fit(*data.values())

    @pytest.mark.parametrize("which", ["labeled", "unlabeled", "validation"])
    @pytest.mark.parametrize("generator", ["torch", "numpy", "python", "own"])
    def test_data_sets_that_augment_by_themselves_are_refused(self, which, generator):
        own = np.random.default_rng()
        draw = {"torch": lambda: float(torch.rand(())), "numpy": np.random.rand, "python": random.random}

        class Flipping(Named):
            def __getitem__(self, index):
                item = super().__getitem__(index)
                image, *mask = item if isinstance(item, tuple) else (item,)
                flips = draw.get(generator, own.random)() < 0.5
                parts = [part.flip(-1) if flips else part for part in (image, *mask)]
                return tuple(parts) if mask else parts[0]

        data = {"labeled": list(labeled()), "unlabeled": list(unlabeled()) * 3, "validation": list(labeled())}
        sets = {name: (Flipping if name == which else Named)(items, name) for name, items in data.items()}
        began = time.monotonic()
        with pytest.raises(DataError, match=rf"item '{which}/\d+' of the {which} data set changes from one reading"):
            trainer().fit(sets["labeled"], sets["unlabeled"], sets["validation"])
        assert time.monotonic() - began < 60

    def test_of_other_workers_or_bars_is_the_same_run(self, tmp_path):
        trainer(workdir=tmp_path).fit(labeled(), unlabeled())
        busy = dataclasses.replace(CONFIG, num_workers=1, save_every=5.0, eval_batch_size=3)
        trainer(workdir=tmp_path, config=busy).fit(labeled(), unlabeled())


def _nudged(step):
    def nudged(self, batch, **options):
        yield from list(step(self, batch, **options))
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter += 1e-3

    return nudged


KILLED = """
import sys, torch, stseg
from torch import nn
generator = torch.Generator().manual_seed(0)
images = torch.rand(30, 3, 24, 24, generator=generator)
pairs = [(image, (image[0] > 0.5).byte()) for image in images[:4]]

def make_model():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))

config = stseg.TrainConfig(steps=60, batch_size=4, weak=stseg.WeakAugment(24), lr=0.01, save_every=0.02)
options = {"workdir": sys.argv[1], "progress": False}
stseg.SelfTrainer(make_model, num_classes=2, config=config, **options).fit(pairs, list(images[4:]))
"""


@pytest.mark.slow
def test_killed_at_any_moment_a_run_comes_to_the_same_result(tmp_path):
    def start(folder: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], env=environment)

    assert start(tmp_path / "whole").wait() == 0
    killed = tmp_path / "killed"
    # Killed as soon as there is a first sign of each of these.
    for sign in (
        "teacher/state/latest.pt",
        "reliable/masks/1*.png",
        "student-1/history.jsonl",
        "unreliable/masks/*.png",
    ):
        process = start(killed)
        while process.poll() is None and not list(killed.glob(sign)):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, sign
    assert not (killed / "student-2" / "model.safetensors").exists()
    assert start(killed).wait() == 0
    ours, theirs = content(killed), content(tmp_path / "whole")
    assert {name: value for name, value in ours.items() if not name.endswith(".part")} == theirs


@pytest.mark.parametrize("recipe", [ST, STPlusPlus])
def test_from_scratch_are_options_of_the_recipe(recipe):
    made = recipe.from_scratch(pseudo_weight=0.5)
    assert made == recipe(student_init="teacher", labeling=Labeling(keep_per_class=0.8), pseudo_weight=0.5)
    assert recipe.from_scratch(student_init="fresh").student_init == "fresh"
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.student_init = "fresh"


class TestAnyMethod:
    def test_trains_in_one_stage_as_fit_does(self, tmp_path):
        result = trainer(method=own, workdir=tmp_path).fit(labeled(), unlabeled())
        torch.manual_seed(derive_seed(SEED, "init", "train"))
        config = CONFIG.with_seed(derive_seed(SEED, "train"))
        by_hand = fit(Entropic(make_model()), labeled(), config, unlabeled=unlabeled(), progress=False)
        assert list(result.stages) == ["train"]
        assert same(result.model, by_hand.model)
        assert [row["entropy"] for row in result.stages["train"].history] == [row["entropy"] for row in by_hand.history]
        assert same(trainer(method=own, workdir=tmp_path).fit(labeled(), unlabeled()).model, result.model)

    def test_may_be_the_teacher_of_st(self):
        result = trainer(method=ST(teacher=own)).fit(labeled(), unlabeled())
        torch.manual_seed(derive_seed(SEED, "init", "teacher"))
        config = CONFIG.with_seed(derive_seed(SEED, "teacher"))
        twice = Mixture(labeled(), [])
        teacher = fit(Entropic(make_model()), twice, config, unlabeled=unlabeled(), progress=False).model.network
        assert same(result.stages["teacher"].model.network, teacher)
        guessed = [(image, mask_by_hand(teacher, image)) for image in unlabeled()]
        assert same(result.model.network, train_by_hand("student", labeled(), guessed)[0])

    def test_may_be_the_student_of_st_plus_plus(self):
        result = trainer(method=STPlusPlus(student=own)).fit(labeled(), unlabeled())
        assert "entropy" not in result.stages["teacher"].history[0]
        for step in ("student-1", "student-2"):
            assert all(math.isfinite(row["entropy"]) for row in result.stages[step].history)
        assert same(result.stages["teacher"].model.network, train_by_hand("teacher", labeled())[0])

    def test_may_start_a_student_from_its_teacher(self):
        made = []

        def first_weights(make_model):
            made.append(copy.deepcopy(model := make_model()))
            return Entropic(model)

        result = trainer(method=ST(student=first_weights, student_init="teacher")).fit(labeled(), unlabeled())
        assert same(made[-1], result.stages["teacher"].model.network)

    def test_needs_unlabeled_images_where_it_learns_from_them(self):
        for method in (own, Baseline(teacher=own)):
            with pytest.raises(
                ValueError, match=r"Entropic learns from unlabeled images; expected fit\(labeled, unlab"
            ):
                trainer(method=method).fit(labeled())

    def test_that_makes_something_else_is_refused(self):
        with pytest.raises(TypeError, match=r"method of step 'train' is Sequential; expected a stseg\.Method"):
            trainer(method=lambda make_model: make_model()).fit(labeled(), unlabeled())

    @pytest.mark.parametrize(
        ("method", "message"),
        [
            ("st+", r"method is 'st\+'; expected 'supervised', 'st', 'st\+\+', 'fixmatch'"),
            (
                STPlusPlus,
                r"method is the class STPlusPlus; expected .* a recipe such as stseg\.methods\.STPlusPlus\(\)",
            ),
            (Entropic, "method is the class Entropic; expected .* lambda make_model"),
            (Supervised(nn.Conv2d(3, 3, 1)), "method is Supervised; expected .* lambda make_model"),
            (None, "method is NoneType; expected"),
            (3, "method is int; expected"),
        ],
    )
    def test_mistakes_are_named_at_once(self, method, message):
        with pytest.raises(ValueError, match=message):
            trainer(method=method)

    def test_has_no_teacher(self):
        teacher = trainer(method="supervised").fit(labeled()).stages["teacher"]
        with pytest.raises(ValueError, match=r"trains no teacher; expected fit.* without teacher="):
            trainer(method=own).fit(labeled(), unlabeled(), teacher=teacher)


def test_log_gets_the_rows_of_each_step_under_its_name():
    rows = []
    result = trainer(method=ST(student=own), log=rows.append).fit(labeled(), unlabeled())
    expected = [
        {f"{step}/{name}": value for name, value in row.items()}
        for step in ("teacher", "student")
        for row in result.stages[step].history
    ]
    assert rows == expected
    assert {"teacher/loss", "teacher/lr"} <= rows[0].keys()
    assert "student/entropy" in rows[-1]


@pytest.mark.parametrize("recipe", [ST, STPlusPlus])
def test_a_step_of_the_student_is_tried_before_the_teacher_is_trained(recipe, tmp_path):
    def strong(images, masks, where):
        assert where.all(), "in the place of pseudo-labeled images"
        raise ZeroDivisionError("the strong augmentation")

    with pytest.raises(stseg.MethodError, match=r"Supervised fails .* ZeroDivisionError: the strong augmentation"):
        trainer(method=recipe(strong=strong), workdir=tmp_path).fit(labeled(), unlabeled())
    assert not list(tmp_path.rglob("history.jsonl"))
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(stseg.MethodError, match="the strong augmentation"):  # and again, where the folder is known
        trainer(method=recipe(strong=strong), workdir=tmp_path).fit(labeled(), unlabeled())


def test_unreadable_images_are_left_out_of_the_unlabeled_stream():
    class Broken(Named):
        def __getitem__(self, index):
            if index == 2:
                raise stseg.UnreadableImageError("2.png cannot be read")
            return super().__getitem__(index)

    images = Broken(list(unlabeled()), "u")
    for method in (own, ST(student=own), STPlusPlus(teacher=own)):
        result = trainer(method=method, skip_unreadable=True).fit(labeled(), images)
        assert [skipped.id for skipped in result.skipped] == ["u/2"]
