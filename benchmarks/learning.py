"""Compare every method with supervised training over several seeds, and with itself when its targets are wrong.

    python benchmarks/learning.py --out runs/learning

Networks, data and settings are those of the examples, in bfloat16: 20 scenes with masks and 200 without, equal steps
from random weights. In a run with wrong targets, what a method learns on unlabeled images is exchanged: each class for
the next, images and places for others, turns for others. A method that gains by what it is meant to gain by is worse
then. A killed run resumes when the same command is given again; with ``--methods`` several commands share the work;
each prints a table of all that has been done, which ``--page`` puts between the page's ``learning-table`` marks.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import segmentation_models_pytorch as smp
import torch
from pages import put
from timing import conditions
from torch import Tensor, nn

import stseg
from stseg import methods
from stseg.augment import BoxMix, CropPair
from stseg.data import SyntheticScenes
from stseg.modules import FlawDetector

CLASSES, SIZE = len(SyntheticScenes.classes), 48
LABELED, UNLABELED, HELD_OUT = 20, 200, 200
SUPERVISED = "supervised"


def make_network(in_channels: int = 3, classes: int = CLASSES) -> nn.Module:
    """Make the network of the examples, with random weights."""
    network: nn.Module = smp.Unet(
        "tu-test_resnet",
        encoder_weights=None,
        in_channels=in_channels,
        classes=classes,
        encoder_depth=3,
        decoder_channels=(64, 32, 16),
    )
    return network


net = make_network
METHODS: dict[str, Callable[[], stseg.Method]] = {
    "FixMatch": lambda: methods.FixMatch(net(), threshold=0.8),
    "UniMatch": lambda: methods.UniMatch(net(), threshold=0.8),
    "UniMatch V2": lambda: methods.UniMatchV2(net(), threshold=0.8, decay=0.98),
    "Mean Teacher": lambda: methods.MeanTeacher(net(), weight=10),
    "CutMix-Seg": lambda: methods.CutMixSeg(net(), threshold=0.8, weight=3.0),
    "ClassMix": lambda: methods.ClassMix(net(), threshold=0.8),
    "CPS": lambda: methods.CPS(net(), net(), weight=0.5),
    "CPS with CutMix": lambda: methods.CPS(net(), net(), weight=0.5, mix=BoxMix(area=(0.25, 0.5), boxes=3)),
    "GCT": lambda: methods.GCT(net(), net(), num_classes=CLASSES, detector=FlawDetector(3 + CLASSES, width=16)),
    "CCT": lambda: methods.CCT(net(), num_classes=CLASSES, channels=48),
    "DCC": lambda: methods.DCC(net(), channels=16, pairs=CropPair(32, base_size=SIZE, scale=(0.8, 2.0)), memory=256),
    "U2PL": lambda: methods.U2PL(net(), num_classes=CLASSES, channels=16, width=32, start=0.5, memory=2000, keys=64),
    "AdvSSL": lambda: methods.AdvSSL(net(), num_classes=CLASSES),
    "S4GAN": lambda: methods.S4GAN(net(), num_classes=CLASSES),
    "ECS": lambda: methods.ECS(net(), net(3 + CLASSES, CLASSES + 1)),
    "S4L": lambda: methods.S4L(net(), num_classes=CLASSES),
}


def wrong_classes(loss: Callable[..., Tensor], *, only_weighted: bool = False) -> Callable[..., Tensor]:
    """Return the loss with the next class in place of each class of its target."""

    def changed(logits: Tensor, target: Tensor, *, ignore_index: int = 255, **options: Any) -> Tensor:
        if not only_weighted or "weight" in options:
            target = torch.where((target >= 0) & (target < CLASSES), (target + 1) % CLASSES, target)
        return loss(logits, target, ignore_index=ignore_index, **options)

    return changed


def wrong_probabilities(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss with the probabilities of each class in place of those of the next."""
    return lambda prediction, target, **options: loss(prediction, target.roll(1, 1), **options)


def wrong_images(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss with the probabilities of another image: a decoder of its own would learn to rename classes."""
    return lambda prediction, target, **options: loss(prediction, target.roll(1, 0), **options)


def wrong_places(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the contrast with features of another place in place of those of the same."""
    return lambda one, other, *rest, **options: loss(one, other.roll(len(other) // 2 + 1, 0), *rest, **options)


def wrong_turns(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the loss with turns that have nothing to do with the images."""

    def changed(scores: Tensor, turns: Tensor, **options: Any) -> Tensor:
        return loss(scores, torch.where(turns < 0, turns, torch.randint_like(turns, 4)), **options)

    return changed


WRONG: dict[str, tuple[str, Callable[..., Callable[..., Tensor]]]] = {
    "FixMatch": ("fixmatch.consistency_loss", wrong_classes),
    "UniMatch": ("unimatch.consistency_loss", wrong_classes),
    "UniMatch V2": ("unimatch_v2.consistency_loss", wrong_classes),
    "Mean Teacher": ("mean_teacher.squared_difference", wrong_probabilities),
    "CutMix-Seg": ("cutmix_seg.squared_difference", wrong_probabilities),
    "ClassMix": ("class_mix.consistency_loss", wrong_classes),
    "CPS": ("cps.consistency_loss", wrong_classes),
    "CPS with CutMix": ("cps.consistency_loss", wrong_classes),
    "GCT": ("gct.squared_difference", wrong_probabilities),
    "CCT": ("cct.squared_difference", wrong_images),
    "DCC": ("dcc.directional_contrast", wrong_places),
    "U2PL": ("u2pl.cross_entropy", wrong_classes),
    "AdvSSL": ("adv_ssl.cross_entropy", wrong_classes),
    "S4GAN": ("s4gan.cross_entropy", wrong_classes),
    "ECS": ("ecs.cross_entropy", partial(wrong_classes, only_weighted=True)),
    "S4L": ("s4l.cross_entropy", wrong_turns),
}
"""The loss of each method on unlabeled images, and what makes it wrong."""


def with_wrong_targets(name: str) -> AbstractContextManager[object]:
    """Exchange the targets of a method within the block."""
    place, change = WRONG[name]
    file, function = place.split(".")
    module = importlib.import_module(f"stseg.methods.{file}")
    return patch.object(module, function, change(getattr(module, function)))


def score(name: str, seed: int, *, wrong: bool, steps: int, folder: Path) -> float:
    """Train once, or take up where a killed run stopped, and return the held-out mIoU in percent."""
    path = folder / "score.json"
    if path.exists():
        return float(json.loads(path.read_text()))
    config = stseg.TrainConfig(
        steps=steps,
        batch_size=8,
        weak=stseg.WeakAugment(SIZE, base_size=SIZE, scale=(0.67, 1.5)),
        optimizer="adamw",
        lr=2e-3,
        head_lr_factor=1,
        precision="bf16",
        seed=seed,
    )
    torch.manual_seed(seed)
    method = make_network() if name == SUPERVISED else METHODS[name]()
    labeled = SyntheticScenes(LABELED, size=SIZE, seed=3 * seed)
    unlabeled = None if name == SUPERVISED else SyntheticScenes(UNLABELED, size=SIZE, seed=3 * seed + 1)
    held_out = SyntheticScenes(HELD_OUT, size=SIZE, seed=3 * seed + 2)
    with with_wrong_targets(name) if wrong else nullcontext():
        result = stseg.fit(method, labeled, config, unlabeled=unlabeled, workdir=folder, progress=False)
    found = 100 * stseg.evaluate(result.model, held_out, num_classes=CLASSES, progress=False).compute()
    path.write_text(json.dumps(found))
    return found


def table(found: dict[str, dict[int, float]]) -> str:
    """Make the Markdown table of the scores by name, ``"X, wrong"`` for wrong targets, and seed."""
    base = found[SUPERVISED]
    lines = [
        "| Method | mIoU | against supervised | better on | with wrong targets | worse on |",
        "|---|---:|---:|---:|---:|---:|",
        f"| supervised | {statistics.fmean(base.values()):.1f} | | | | |",
    ]
    for name in METHODS:
        own, wrong = found.get(name, {}), found.get(f"{name}, wrong", {})
        if not own:
            continue
        gain = statistics.fmean(own[seed] - base[seed] for seed in own)
        better = sum(own[seed] > base[seed] for seed in own)
        cells = [name, f"{statistics.fmean(own.values()):.1f}", f"{gain:+.1f}", f"{better} of {len(own)}", "", ""]
        if wrong:
            cells[4:] = [
                f"{statistics.fmean(wrong.values()):.1f}",
                f"{sum(wrong[seed] < own[seed] for seed in wrong if seed in own)} of {len(wrong)}",
            ]
        lines.append(f"| {' | '.join(cells)} |".replace("|  ", "| "))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--skip-wrong", action="store_true", help="no runs with wrong targets")
    parser.add_argument("--page", type=Path, help="a Markdown page with the marks learning-table")
    options = parser.parse_args(arguments)
    kinds = (False,) if options.skip_wrong else (False, True)
    ways = [(SUPERVISED, False), *((name, wrong) for name in options.methods for wrong in kinds)]
    for seed in options.seeds:
        for name, wrong in ways:
            key = f"{name}, wrong" if wrong else name
            value = score(name, seed, wrong=wrong, steps=options.steps, folder=options.out / key / str(seed))
            print(f"seed {seed}  {key:22} {value:.1f}", flush=True)
    found = {
        folder.name: {
            int(path.parent.name): float(json.loads(path.read_text())) for path in folder.glob("*/score.json")
        }
        for folder in sorted(options.out.iterdir())
    }
    lines = f"{table(found)}\n\n{options.steps} steps, {conditions()}."
    print(lines)
    if options.page:
        put(options.page, "learning-table", lines)


if __name__ == "__main__":
    main()
