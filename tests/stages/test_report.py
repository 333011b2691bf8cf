from __future__ import annotations

import builtins
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import stseg
from stseg.inference.mask_files import palette


class Named(list):
    def __init__(self, items, ids) -> None:
        super().__init__(items)
        self.ids = ids


def run(method: str, workdir: Path | None = None, channels: int = 3, **options):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, channels, 16, 20, generator=generator)
    labeled = [(image, (image[0] > 0.5).byte()) for image in images[:2]]
    config = stseg.TrainConfig(steps=4, batch_size=2, weak=stseg.WeakAugment(16))
    trainer = stseg.SelfTrainer(
        lambda: nn.Conv2d(channels, 2, 1), num_classes=2, config=config, method=method, workdir=workdir, progress=False
    )
    ids = ["a", "&amp;'b'", "street/0001 with quite a long name", "d"]
    return trainer.fit(labeled, Named(list(images[2:]), ids), options.get("val"))


class Page(HTMLParser):
    """The text of a page, the pictures it asks for, and whether its tags are closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.pictures, self.open = "", [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


@pytest.mark.parametrize(
    ("method", "figures", "setting"),
    [
        ("supervised", {"training"}, "method.double_below"),
        ("st", {"training", "labels"}, "method.pseudo_weight"),
        ("st++", {"training", "scores", "most_stable", "least_stable"}, "method.reliable_fraction"),
    ],
)
def test_a_run_with_a_work_directory_ends_with_a_page_and_its_pictures(tmp_path, method, figures, setting):
    result = run(method, tmp_path)
    page = Page(tmp_path / "report.html")
    assert set(page.pictures) == {f"figures/{name}.png" for name in figures}
    for picture in page.pictures:
        assert np.asarray(Image.open(tmp_path / picture).convert("L")).std() > 5
    for step in result.seconds:
        assert step in page.text
    for word in ("config.batch_size", setting, "torch", stseg.__version__):
        assert word in page.text


def test_pictures_show_the_pseudo_masks_in_the_colors_of_the_store(tmp_path):
    result = run("st", tmp_path)
    picture = np.asarray(Image.open(tmp_path / "figures" / "labels.png").convert("RGB")).reshape(-1, 3)
    colors = np.array(palette()).reshape(-1, 3)
    shown = {int(c) for _, mask in result.labels["labels"] for c in mask.unique()}
    for index in shown:
        assert (picture == colors[index]).all(1).sum() > 100


def test_class_names_are_a_legend_and_names_are_escaped(tmp_path):
    stseg.write_report(run("st++"), tmp_path, class_names=["road", "<script>alert(1)</script>"])
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text
    page = Page(tmp_path / "report.html")
    assert "road" in page.text
    assert "<script>alert(1)</script>" in page.text
    assert re.search(r"background: rgb\(128, 0, 0\)", text)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_any_channels_can_be_shown(tmp_path, channels):
    run("st++", tmp_path, channels=channels)
    assert (tmp_path / "figures" / "most_stable.png").exists()


def test_validation_is_in_the_table(tmp_path):
    image = torch.rand(3, 16, 20)
    result = run("supervised", tmp_path, val=[(image, (image[0] > 0.5).byte())])
    assert f"{100 * result.stages['teacher'].history[-1]['miou']:.1f}" in Page(tmp_path / "report.html").text


def test_without_matplotlib_the_page_has_its_tables_and_says_so(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    run("st++", tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.pictures == []
    assert "pip install stseg[report]" in page.text
    assert "student-2" in page.text
