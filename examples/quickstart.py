"""Supervised training, FixMatch and ST++ on synthetic street scenes: a table and a figure in a few minutes on a CPU.

    python examples/quickstart.py

Twenty scenes have masks, four hundred do not. FixMatch learns from both kinds at once, in one training. ST++ starts
from the supervised network, and trains two students. Every training takes the same number of steps
(``benchmarks/demo_seeds.py`` repeats this over several seeds).
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plots import draw
from torch import Tensor, nn
from torch.utils.data import Subset

import stseg
from stseg.data import SyntheticScenes

CLASSES = SyntheticScenes.classes
HELD_OUT_SEED = 10_000
LABELED, UNLABELED, HELD_OUT, SIZE = 20, 400, 150, 48
STEPS = 1500


class SmallUNet(nn.Module):
    """A network that is small enough to converge on a CPU within a minute."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList(self.block(i, o) for i, o in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(self.block(fine + coarse, fine) for coarse, fine in pairwise(reversed(widths)))
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    @staticmethod
    def block(inside: int, outside: int) -> nn.Sequential:
        """Build two convolutions."""
        first, second = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        return nn.Sequential(first, nn.BatchNorm2d(outside), nn.ReLU(), second, nn.BatchNorm2d(outside), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, 3, H, W)`` to logits ``(B, K, H, W)``; stseg pads H and W to multiples of the stride."""
        passed = [self.down[0](x)]
        for block in self.down[1:]:
            passed.append(block(F.max_pool2d(passed[-1], 2)))
        x = passed.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), passed.pop()], 1))
        return self.head(x)


def make_network() -> nn.Module:
    """Make a network; any other works too."""
    return SmallUNet(len(CLASSES))


def scenes(seed: int) -> SyntheticScenes:
    """Return all training scenes; the first ones are labeled."""
    return SyntheticScenes(LABELED + UNLABELED, size=SIZE, seed=seed)


def settings(steps: int, seed: int) -> stseg.TrainConfig:
    """Return the settings of every stage of every method."""
    return stseg.TrainConfig(
        steps=steps,
        batch_size=8,
        weak=stseg.WeakAugment(SIZE, base_size=SIZE, scale=(0.67, 1.5)),
        optimizer="adamw",
        lr=2e-3,
        head_lr_factor=1,
        weight_decay=0.01,
        seed=seed,
    )


def run(steps: int, seed: int, workdir: Path) -> dict[str, stseg.SelfTrainingResult]:
    """Train by each method; ST++ starts from the supervised network."""
    images, config = scenes(seed), settings(steps, seed)
    labeled, unlabeled = Subset(images, range(LABELED)), Subset(images, range(LABELED, len(images)))

    def trainer(name: str, method: Any) -> stseg.SelfTrainer:
        return stseg.SelfTrainer(
            make_network, num_classes=len(CLASSES), config=config, method=method, workdir=workdir / name
        )

    supervised = trainer("supervised", stseg.methods.Baseline()).fit(labeled)
    teacher = supervised.stages["teacher"]
    fixmatch = trainer("FixMatch", lambda make: stseg.methods.FixMatch(make(), threshold=0.8)).fit(labeled, unlabeled)
    st_plus_plus = trainer("ST++", stseg.methods.STPlusPlus()).fit(labeled, unlabeled, teacher=teacher)
    return {"supervised": supervised, "FixMatch": fixmatch, "ST++": st_plus_plus}


def table(results: dict[str, stseg.SelfTrainingResult], held_out: SyntheticScenes) -> str:
    """Format mIoU and IoU of each class on held-out scenes, in percent, and the seconds of each step."""
    lines = [f"{'':12}{'mIoU':>8}" + "".join(f"{name:>10}" for name in CLASSES)]
    for name, result in results.items():
        metric = stseg.evaluate(result.model, held_out, num_classes=len(CLASSES), progress=False)
        lines.append(
            f"{name:12}{100 * metric.compute():8.1f}" + "".join(f"{100 * iou:10.1f}" for iou in metric.iou().tolist())
        )
    lines.append("")
    for name, result in results.items():
        steps = "  ".join(f"{step} {seconds:.0f} s" for step, seconds in result.seconds.items())
        lines.append(f"{name:12}{steps}")
    return "\n".join(lines)


def main() -> None:
    """Train, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the figure and the work directories")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes and of the training")
    parser.add_argument("--steps", type=int, default=STEPS, help="length of every stage")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # so small a network gains little by a second thread, and waits for it on busy cores
    results = run(arguments.steps, arguments.seed, arguments.out / f"seed_{arguments.seed}")
    held_out = SyntheticScenes(HELD_OUT, size=SIZE, seed=HELD_OUT_SEED)
    print(table(results, held_out))
    draw(results, held_out, arguments.out / "demo.png")
    print(f"\nFigure: {arguments.out / 'demo.png'}")


if __name__ == "__main__":
    main()
