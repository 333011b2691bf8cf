"""Runs whose networks look at large images by tiles."""

from __future__ import annotations

import json
from functools import partial
from typing import ClassVar

import pytest
import torch
from small import Named, network, pairs
from torch import nn

import stseg
from stseg import MultiScaleFlip, StabilityRanker, Tiled, TrainConfig, WeakAugment, WorkdirMismatchError
from stseg.methods import ST, FixMatch, Labeling, STPlusPlus

CONFIG = TrainConfig(steps=3, batch_size=2, weak=WeakAugment(16), precision="fp32")
LABELED = pairs(3, size=20)
IMAGES = Named([image for image, _ in pairs(4, size=40, seed=1)])


class Counting(nn.Sequential):
    """Remembers the sizes of the images that it is called for in evaluation mode."""

    seen: ClassVar[set[tuple[int, int]]] = set()

    def forward(self, x):
        if not self.training:
            Counting.seen.add(tuple(x.shape[-2:]))
        return super().forward(x)


@pytest.fixture(autouse=True)
def forget():
    Counting.seen = set()


def make():
    return stseg.Segmenter(Counting(*network(7)), stride=1)


def start(workdir, method):
    trainer = stseg.SelfTrainer(make, num_classes=2, config=CONFIG, method=method, workdir=workdir, progress=False)
    return trainer.fit(LABELED, IMAGES)


def test_labels_of_st_are_those_of_tiles(tmp_path):
    result = start(tmp_path, ST(labeling=Labeling(tta=partial(Tiled, size=16))))
    assert (16, 16) in Counting.seen
    assert (40, 40) not in Counting.seen
    teacher = Tiled(result.stages["teacher"].model, 16)
    for image, mask in result.labels["labels"]:
        with torch.no_grad():
            assert torch.equal(teacher(image[None])[0].argmax(0).byte(), mask)


@pytest.mark.parametrize(
    "tta", [Tiled, partial(Tiled, size=16), lambda model: Tiled(MultiScaleFlip(model, (0.5, 1.0)), 16)]
)
def test_runs_are_taken_up_again(tmp_path, tta):
    first = start(tmp_path, STPlusPlus(labeling=Labeling(tta=tta)))
    again = start(tmp_path, STPlusPlus(labeling=Labeling(tta=tta)))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    json.loads((tmp_path / "run.json").read_text())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(Tiled, size=16), partial(Tiled, size=24)),
        (partial(Tiled, size=16), partial(Tiled, size=16, overlap=0.5)),
        (Tiled, MultiScaleFlip),
    ],
)
def test_the_settings_of_tiles_change_a_run(tmp_path, one, other):
    start(tmp_path, ST(labeling=Labeling(tta=one)))
    with pytest.raises(WorkdirMismatchError, match="made with other settings or data"):
        start(tmp_path, ST(labeling=Labeling(tta=other)))
    start(tmp_path, ST(labeling=Labeling(tta=one)))


def test_the_settings_of_tiles_change_a_store_and_a_ranking(tmp_path):
    bare, other = network(), network(1)

    def label(size):
        stseg.PseudoLabeler(Tiled(bare, size), num_classes=2, progress=False).label(IMAGES, tmp_path / "masks")

    def rank(size):
        networks = [Tiled(each, size) for each in (other, bare)]
        return StabilityRanker(networks, num_classes=2, progress=False).rank(IMAGES, store=tmp_path / "scores")

    for work in (label, rank):
        work(16)
        with pytest.raises(WorkdirMismatchError):
            work(24)
        work(16)


def test_tiles_rank_and_evaluate():
    networks = [network(seed) for seed in range(3)]
    tiled = [Tiled(each, 16) for each in networks]
    ranking = StabilityRanker(tiled, num_classes=2, progress=False).rank(IMAGES)
    for position, id in enumerate(ranking.ids):
        image = IMAGES[IMAGES.ids.index(id)][None]
        with torch.no_grad():
            *earlier, last = (each.eval()(image).argmax(1) for each in tiled)
        expected = stseg.functional.stability(torch.stack(earlier), last, 2)
        assert ranking.scores[position] == pytest.approx(float(expected))
    data = [(image, (image[0] > 0.5).byte()) for image in IMAGES]
    metric = stseg.MeanIoU(2)
    with torch.no_grad():
        for image, mask in data:
            metric.add(tiled[0](image[None])[0].argmax(0), mask)
    assert stseg.evaluate(tiled[0], data, num_classes=2, progress=False).compute() == metric.compute()


def test_a_network_that_is_tiled_is_so_in_every_step(tmp_path):
    """Training, validation, ranking and labeling of a run whose ``make_model`` returns a Tiled."""
    val = pairs(2, size=40, seed=2)
    trainer = stseg.SelfTrainer(
        lambda: Tiled(make(), 16),
        num_classes=2,
        config=CONFIG,
        method=STPlusPlus(labeling=Labeling(tta=None)),
        workdir=tmp_path,
        progress=False,
    )
    result = trainer.fit(LABELED, IMAGES, val)
    assert Counting.seen == {(16, 16)}
    assert isinstance(result.model, Tiled)
    loaded = stseg.load(tmp_path, Tiled(make(), 16))
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))
    plain = start(None, STPlusPlus(labeling=Labeling(tta=partial(Tiled, size=16))))
    networks = [each.stages["teacher"].model for each in (result, plain)]
    for a, b in zip(*(each.parameters() for each in networks), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_methods_train_through_tiles():
    trained = stseg.fit(FixMatch(Tiled(make(), 16)), LABELED, CONFIG, unlabeled=IMAGES, progress=False)
    assert isinstance(trained.model, Tiled)
