"""Use an installed stseg from files to a network that is loaded again, with its required dependencies alone."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from PIL import Image

import stseg
from stseg.data import SegmentationFolder, SyntheticScenes, split_by_masks, split_ids
from stseg.methods import FixMatch


def make_network() -> torch.nn.Module:
    """Return an untrained network."""
    network: torch.nn.Module = smp.Unet("resnet18", encoder_weights=None, classes=7)
    return network


def save_scenes(folder: Path) -> None:
    """Draw ten scenes, four of them with a mask."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir()
    scenes = SyntheticScenes(10, size=64)
    for index in range(len(scenes)):
        image, mask = scenes[index]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "images" / f"{index}.png")
        if index < 4:
            Image.fromarray(mask.numpy()).save(folder / "masks" / f"{index}.png")


def main(folder: Path) -> None:
    """Label, rank, train, save and load."""
    save_scenes(folder)
    labeled, unlabeled = split_by_masks(folder / "images", folder / "masks")
    assert (len(labeled), len(unlabeled)) == (4, 6)
    config = stseg.TrainConfig(steps=4, batch_size=2, weak=stseg.WeakAugment(32))
    options: dict[str, Any] = {"num_classes": 7, "config": config, "workdir": folder / "run", "progress": False}
    result = stseg.SelfTrainer(make_network, **options).fit(labeled, unlabeled)

    image = labeled[0][0][None]
    expected = result.model.eval()(image)
    assert expected.shape == (1, 7, 64, 64)
    assert torch.equal(stseg.load(folder / "run").eval()(image), expected)
    again = stseg.SelfTrainer(make_network, **options).fit(labeled, unlabeled)
    assert torch.equal(again.model.eval()(image), expected)

    train, _ = split_ids(labeled.ids, labeled=2)
    others: dict[str, Any] = {"unlabeled": unlabeled, "val": labeled.without(train)}
    trained = stseg.fit(FixMatch(make_network()), labeled.only(train), config, **others, progress=False)
    stseg.save_weights(trained.model, folder / "fixmatch.safetensors")
    copy = stseg.Segmenter(make_network())
    stseg.load_weights(copy, folder / "fixmatch.safetensors")
    assert torch.allclose(copy.eval()(image), trained.model.eval()(image), atol=1e-4)

    labeler = stseg.PseudoLabeler(trained.model, num_classes=7, progress=False)
    pseudo = labeler.label(unlabeled, store=stseg.MaskStore(folder / "labels"))
    masks = SegmentationFolder(folder / "images", folder / "labels", labeled_only=True)
    assert masks.ids == pseudo.ids == unlabeled.ids
    assert torch.equal(masks[0][1], pseudo[0][1])
    assert 0 <= stseg.evaluate(trained.model, labeled, num_classes=7, progress=False).compute() <= 1
    print(f"stseg {stseg.__version__} with PyTorch {torch.__version__} on Python {sys.version.split()[0]} works")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
