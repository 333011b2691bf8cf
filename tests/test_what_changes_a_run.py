"""A work directory notices all that changes the result, and nothing that does not."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import stseg
from stseg import WorkdirMismatchError
from stseg.data import MixedDataset, SegmentationFolder
from stseg.methods import STPlusPlus

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.rand(3, 20, 20, generator=GENERATOR) for _ in range(8)]
LABELED = [(image, (image[0] > 0.5).byte()) for image in IMAGES[:3]]
CONFIG = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)}


def first_then(folder, first, then):
    """Run one stage in a folder, then another one, from the same initial weights."""
    torch.manual_seed(0)
    first(folder)
    torch.manual_seed(0)
    with pytest.raises(WorkdirMismatchError, match="was made with other settings or data"):
        then(folder)
    torch.manual_seed(0)
    first(folder)  # which is still that of the first one


@pytest.mark.filterwarnings("ignore::stseg.errors.NetworkWarning")
def test_select_changes_it(tmp_path):
    def use(key):
        def make():
            return stseg.Segmenter(Two(), select=(lambda o: o["a"]) if key == "a" else (lambda o: o["b"]))

        def fit(folder):
            stseg.fit(make(), LABELED, CONFIG, workdir=folder / "fit", progress=False)

        def run(folder):
            trainer = stseg.SelfTrainer(
                make, num_classes=2, config=CONFIG, method="supervised", workdir=folder / "run", progress=False
            )
            trainer.fit(LABELED)

        def label(folder):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                labeler = stseg.PseudoLabeler(make(), num_classes=2, progress=False)
            labeler.label(IMAGES, folder / "masks")

        return fit, run, label

    for first, then in zip(use("a"), use("b"), strict=True):
        first_then(tmp_path, first, then)


def test_the_transform_and_the_masks_of_a_mixture_change_it(tmp_path):
    config = dataclasses.replace(CONFIG, weak=None)

    def fit(transform, pseudo):
        return lambda folder: stseg.fit(
            nn.Conv2d(3, 2, 1),
            MixedDataset(LABELED, pseudo, transform=transform),
            config,
            workdir=folder,
            progress=False,
        )

    one, other = stseg.WeakAugment(16), stseg.WeakAugment(12)
    pseudo = [(image, (image[0] > 0.5).byte()) for image in IMAGES[3:]]
    others = [(image, (image[0] > 0.6).byte()) for image in IMAGES[3:]]
    first_then(tmp_path / "transform", fit(one, pseudo), fit(other, pseudo))
    first_then(tmp_path / "masks", fit(one, pseudo), fit(one, others))


class Settings:
    def __init__(self, power):
        self.power = power


class MyRanker:
    """Ranks by brightness; its settings are in an object, and it has a network."""

    def __init__(self, power=1.0, seed=0):
        self.settings = Settings(power)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = nn.Conv2d(3, 1, 1)

    def rank(self, dataset):
        scores = [float(dataset[index].mean()) ** self.settings.power for index in range(len(dataset))]
        return stseg.Ranking.from_scores(scores, [str(index) for index in range(len(dataset))])


@pytest.mark.parametrize("other", [{"power": 2.0}, {"seed": 1}])
def test_the_settings_of_a_ranker_change_it(tmp_path, other):
    def run(**settings):
        def start(folder):
            recipe = STPlusPlus(ranker=MyRanker(**settings))
            trainer = stseg.SelfTrainer(
                lambda: nn.Conv2d(3, 2, 1), num_classes=2, config=CONFIG, method=recipe, workdir=folder, progress=False
            )
            trainer.fit(LABELED, IMAGES[3:])

        return start

    first_then(tmp_path, run(), run(**other))


def test_workers_and_compilation_do_not(tmp_path):
    for workers, wrap in ((0, lambda net: net), (1, lambda net: net), (0, nn.DataParallel)):
        config = dataclasses.replace(CONFIG, num_workers=workers)
        torch.manual_seed(0)
        stseg.fit(wrap(nn.Conv2d(3, 2, 1)), LABELED, config, workdir=tmp_path, progress=False)


def refuse_constants(name):
    raise AssertionError(f"{name} is no JSON")


@pytest.mark.parametrize("keep", ["final", "best"])
def test_all_records_are_json(tmp_path, keep):
    trainer = stseg.SelfTrainer(
        lambda: nn.Conv2d(3, 2, 1), num_classes=2, config=CONFIG, workdir=tmp_path, keep=keep, progress=False
    )
    trainer.fit(LABELED, IMAGES[3:], val=[(image + 0, mask) for image, mask in LABELED])
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl")]
    assert {"run.json", "stage.json", "progress.json", "history.jsonl"} <= {path.name for path in files}
    for path in files:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for line in lines:
            json.loads(line, parse_constant=refuse_constants)


def test_a_row_without_a_number_is_json_and_comes_back(tmp_path):
    data = [
        (torch.rand(3, 20, 20), torch.full((20, 20), 255, dtype=torch.uint8).index_fill_(0, torch.tensor([0]), v))
        for v in (0, 1)
    ]
    val = [(torch.rand(3, 20, 20), mask) for _, mask in data]
    torch.manual_seed(0)
    result = stseg.fit(nn.Conv2d(3, 2, 1), data, CONFIG, val=val, workdir=tmp_path, progress=False)
    torch.manual_seed(0)
    again = stseg.fit(nn.Conv2d(3, 2, 1), data, CONFIG, val=val, workdir=tmp_path, progress=False)
    assert again.history == result.history


class TestPixelLimit:
    """Images above PIL's limit are not skipped: the user decides."""

    @pytest.mark.parametrize("workers", [0, 1])
    @pytest.mark.parametrize("own", [False, True])
    def test_is_named(self, tmp_path, monkeypatch, workers, own):
        for index in range(4):
            (tmp_path / "images").mkdir(exist_ok=True)
            size = (40, 40) if index == 2 else (20, 20)
            Image.fromarray(np.full(size[::-1], 9, np.uint8)).save(tmp_path / "images" / f"{index}.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
        names = sorted((tmp_path / "images").iterdir())

        class Own(torch.utils.data.Dataset):
            def __len__(self):
                return len(names)

            def __getitem__(self, index):
                return Image.open(names[index]).convert("RGB")

        data = Own() if own else SegmentationFolder(tmp_path / "images")
        labeler = stseg.PseudoLabeler(nn.Conv2d(3, 2, 1), num_classes=2, num_workers=workers, progress=False)
        with pytest.raises(stseg.DataError, match=r"PIL\.Image\.MAX_IMAGE_PIXELS = None"):
            labeler.label(data, skip_unreadable=True)


def test_images_go_to_the_device_of_the_network():
    model = stseg.Segmenter(nn.Conv2d(3, 2, 1).to("meta"), stride=1)
    assert model(torch.rand(1, 3, 8, 8)).device.type == "meta"
