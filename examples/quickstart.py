"""Supervised, ST and ST++ on drawn street scenes: a table and a picture in a few minutes on two cores.

    python examples/quickstart.py

Twenty scenes have masks, four hundred do not. ST and ST++ start from the same supervised network, which has trained
until more steps help little, and every stage trains for as many steps (``benchmarks/demo_seeds.py`` has the figures).
"""

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.utils.data import Subset

import stseg
from stseg.data import SyntheticScenes

CLASSES = SyntheticScenes.classes
COLORS = ("#8fbf6f", "#a8d5f2", "#6b6b76", "#d99157", "#2f7d3b", "#d43a3a", "#f6d743")
HELD_OUT_SEED = 10_000
LABELED, UNLABELED, HELD_OUT, SIZE = 20, 400, 150, 48
STEPS = 2000


class SmallUNet(nn.Module):
    """Small, so that every stage converges on a CPU within a minute."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList(self.block(i, o) for i, o in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(self.block(fine + coarse, fine) for coarse, fine in pairwise(reversed(widths)))
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    @staticmethod
    def block(inside: int, outside: int) -> nn.Sequential:
        """Two convolutions."""
        first, second = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        return nn.Sequential(first, nn.BatchNorm2d(outside), nn.ReLU(), second, nn.BatchNorm2d(outside), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits ``(B, K, H, W)``; stseg pads H and W to what halving them needs."""
        passed = [self.down[0](x)]
        for block in self.down[1:]:
            passed.append(block(F.max_pool2d(passed[-1], 2)))
        x = passed.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), passed.pop()], 1))
        return self.head(x)


def make_network() -> nn.Module:
    """Any network will do. This memory format makes convolutions faster."""
    return SmallUNet(len(CLASSES)).to(memory_format=torch.channels_last)


def scenes(seed: int) -> SyntheticScenes:
    """All training scenes; the first of them are the labeled ones."""
    return SyntheticScenes(LABELED + UNLABELED, size=SIZE, seed=seed)


def settings(steps: int, seed: int) -> stseg.TrainConfig:
    """How every stage of every method is trained."""
    return stseg.TrainConfig(
        steps=steps,
        batch_size=8,
        crop_size=SIZE,
        base_size=SIZE,
        scale=(0.67, 1.5),
        optimizer="adamw",
        lr=2e-3,
        head_lr_factor=1,
        weight_decay=0.01,
        seed=seed,
    )


def run(steps: int, seed: int, workdir: Path | None = None) -> dict[str, stseg.SelfTrainingResult]:
    """Train by each method; ST and ST++ begin with the supervised network."""
    images = scenes(seed)
    labeled, unlabeled = Subset(images, range(LABELED)), Subset(images, range(LABELED, len(images)))
    results: dict[str, stseg.SelfTrainingResult] = {}
    for name, method in {"supervised": "supervised", "ST": "st", "ST++": "st++"}.items():
        trainer = stseg.SelfTrainer(
            make_network,
            num_classes=len(CLASSES),
            config=settings(steps, seed),
            method=method,  # type: ignore[arg-type]
            workdir=None if workdir is None else workdir / name,
        )
        teacher = results["supervised"].stages["teacher"] if results else None
        results[name] = trainer.fit(labeled, unlabeled, teacher=teacher)
    return results


def table(results: dict[str, stseg.SelfTrainingResult], held_out: SyntheticScenes) -> str:
    """MIoU and IoU of each class on held-out scenes, in per cent, then the seconds of each step."""
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


def figure(results: dict[str, stseg.SelfTrainingResult], held_out: SyntheticScenes, path: Path) -> None:
    """Held-out scenes with truth and predictions; below, the most and the least stable of the images without masks."""
    supervised, final = results["supervised"].model, results["ST++"]
    assert final.ranking is not None
    canvas = Figure(figsize=(12, 10), layout="constrained")
    upper, lower = np.asarray(canvas.subfigures(2, 1, height_ratios=(4, 2)))

    upper.suptitle("Held-out scenes", fontsize=15)
    rows = upper.subplots(4, 6)
    for row, title in zip(rows, ("image", "truth", "supervised", "ST++"), strict=True):
        row[0].set_ylabel(title, fontsize=13)
    for column, index in zip(rows.T, range(rows.shape[1]), strict=True):
        image, mask = held_out[index]
        show_image(column[0], image)
        masks = mask, predicted(supervised, image), predicted(final.model, image)
        for axes, classes in zip(column[1:], masks, strict=True):
            show_mask(axes, classes)

    lower.suptitle("Images without masks, most stable (left) and least (right), and their pseudo-masks", fontsize=15)
    places = [*range(4), *range(len(final.ranking) - 4, len(final.ranking))]
    pseudo = {id: (data, index) for data in final.labels.values() for index, id in enumerate(data.ids)}
    for column, place in zip(lower.subplots(2, 8).T, places, strict=True):
        data, index = pseudo[final.ranking.ids[place]]
        image, mask = data[index]
        show_image(column[0], image)
        column[0].set_title(f"{final.ranking.scores[place]:.2f}")
        show_mask(column[1], mask)

    handles = [Patch(color=color, label=name) for color, name in zip(COLORS, CLASSES, strict=True)]
    canvas.legend(handles=handles, loc="outside lower center", ncols=len(CLASSES), frameon=False, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=100)


def show_image(axes: Axes, image: Tensor) -> None:
    """An image without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set(xticks=[], yticks=[])


def show_mask(axes: Axes, mask: Tensor) -> None:
    """Classes in their colors."""
    axes.imshow(mask.numpy(), cmap=ListedColormap(COLORS), vmin=0, vmax=len(CLASSES) - 1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def predicted(network: nn.Module, image: Tensor) -> Tensor:
    """The class map of one image."""
    with torch.no_grad():
        device = next(network.parameters()).device
        return network(image[None].to(device)).argmax(1)[0].cpu()


def main() -> None:
    """The whole demonstration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the figure and the work directories")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and of the training")
    parser.add_argument("--steps", type=int, default=STEPS, help="length of every training stage")
    arguments = parser.parse_args()
    results = run(arguments.steps, arguments.seed, arguments.out / f"seed_{arguments.seed}")
    held_out = SyntheticScenes(HELD_OUT, size=SIZE, seed=HELD_OUT_SEED)
    print(table(results, held_out))
    figure(results, held_out, arguments.out / "demo.png")
    print(f"\nPicture: {arguments.out / 'demo.png'}")


if __name__ == "__main__":
    main()
