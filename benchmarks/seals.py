"""Measure what the digests of files cost: their share of the time of a run, of starting it again, and per megabyte.

    python benchmarks/seals.py

A run of ST++ with a ResNet-18 U-Net on drawn scenes is profiled, once from its beginning and once when all is done. The
share is the time within ``stseg/storage/seals.py`` and the digests of the saved states.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import segmentation_models_pytorch as smp
from timing import conditions
from torch import nn
from torch.utils.data import Subset

import stseg
from stseg.data import SyntheticScenes

DIGESTS = ("seal", "seal_tensors", "_read_digest")


def make_network() -> nn.Module:
    """Make a U-Net with 14 million weights."""
    network: nn.Module = smp.Unet("resnet18", encoder_weights=None, classes=7)
    return network


def measure(folder: Path, *, size: int, images: int, steps: int) -> tuple[float, float]:
    """Return seconds of a run, and those within digests."""
    scenes = SyntheticScenes(images + 20, size=size, seed=0)
    labeled, unlabeled = Subset(scenes, range(20)), Subset(scenes, range(20, images + 20))
    config = stseg.TrainConfig(steps=steps, batch_size=8, weak=stseg.WeakAugment(size), optimizer="adamw", lr=1e-3)
    trainer = stseg.SelfTrainer(make_network, num_classes=7, config=config, workdir=folder, progress=False)
    profile, began = cProfile.Profile(), time.perf_counter()
    profile.runcall(trainer.fit, labeled, unlabeled)
    seconds = time.perf_counter() - began
    within = 0.0
    for (_, _, name), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        within += cumulative if name in DIGESTS else 0.0
    return seconds, within


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    print(conditions())
    with tempfile.TemporaryDirectory() as folder:
        for name in ("from its beginning", "when all is done"):
            seconds, within = measure(Path(folder), size=options.size, images=options.images, steps=options.steps)
            print(f"{name}: {seconds:.1f} s, of which {within:.2f} s ({100 * within / seconds:.2f} %) digests")


if __name__ == "__main__":
    main()
