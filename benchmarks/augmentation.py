"""Speed of the strong augmentation of a batch, compared with PIL, torchvision, kornia and one copy of the batch.

python benchmarks/augmentation.py

All of one line of the table take their turns in one run, with parameters of their own for each image: jitter, gray and
blur with the probabilities and the settings of the paper. PIL and torchvision take one image after the other; PIL, as
the paper's code does, works on bytes. PIL and StrongAugment cut out a rectangle as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import kornia.augmentation as K
import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from pages import SPEED, publish
from PIL import Image, ImageFilter
from timing import conditions, device, seconds
from torch import Tensor, nn
from torchvision.transforms import ColorJitter, RandomGrayscale, v2

import stseg

COLORS = (0.5, 0.5, 0.5, 0.25)
WIDTHS = (0.1, 2.0)
COPY, PIL, V2, KORNIA, OWN, COMPILED, STEP = (
    "one copy",
    "PIL, one process",
    "torchvision v2",
    "kornia",
    "StrongAugment",
    "StrongAugment, compiled",
    "training step in bf16",
)


def with_pil(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Apply jitter, gray, blur and cutout with PIL as in the paper, including the conversion back to tensors."""
    jitter, gray = ColorJitter(*COLORS), RandomGrayscale(0.2)
    random = np.random.default_rng()
    out_images, out_masks = [], []
    for pixels, mask in zip(images.permute(0, 2, 3, 1).numpy(), masks.numpy(), strict=True):
        image = Image.fromarray(pixels)
        if random.random() < 0.8:
            image = jitter(image)
        image = gray(image)
        if random.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(*WIDTHS)))
        values, classes = np.array(image), mask.copy()
        height, width = classes.shape
        if random.random() < 0.5:
            while True:
                area, ratio = random.uniform(0.02, 0.4) * height * width, random.uniform(0.3, 1 / 0.3)
                h, w = int(np.sqrt(area * ratio)), int(np.sqrt(area / ratio))
                x, y = random.integers(width), random.integers(height)
                if x + w <= width and y + h <= height:
                    break
            values[y : y + h, x : x + w] = random.uniform(0, 255, (h, w, 3))
            classes[y : y + h, x : x + w] = 255
        out_images.append(torch.from_numpy(values).permute(2, 0, 1).float() / 255)
        out_masks.append(torch.from_numpy(classes))
    return torch.stack(out_images), torch.stack(out_masks)


def one_by_one(transform: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a transform to each image of a batch, so that each has parameters of its own."""
    return torch.stack([transform(image) for image in images])


def training_step(batch: int, side: int) -> Callable[[], None]:
    """Make a step of DeepLabV3+ with ResNet-50 under bfloat16, without its optimizer."""
    network = smp.DeepLabV3Plus("resnet50", encoder_weights=None, classes=21).to(device()).train()
    images = torch.rand(batch, 3, side, side, device=device())
    masks = torch.randint(21, (batch, side, side), device=device())
    fill = (0, -side % 16, 0, -side % 16)  # the network takes multiples of its stride

    def step() -> None:
        with torch.autocast(device().type, torch.bfloat16):
            logits = network(F.pad(images, fill))[..., :side, :side]
        torch.autograd.backward(F.cross_entropy(logits.float(), masks))

    return step


def measure(side: int, batch: int, rounds: int) -> dict[str, float]:
    """Return the seconds of each alternative for a batch of crops."""
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    labels = torch.zeros(batch, side, side, dtype=torch.uint8)
    images, masks = pixels.to(device()).float() / 255, labels.to(device())
    torchvision = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(*COLORS)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, WIDTHS)], p=0.5),
        ]
    )
    kornia = nn.Sequential(
        K.ColorJitter(*COLORS, p=0.8), K.RandomGrayscale(p=0.2), K.RandomGaussianBlur((13, 13), WIDTHS, p=0.5)
    )
    strong = stseg.StrongAugment()
    ways: dict[str, Callable[[], object]] = {
        COPY: images.clone,
        PIL: partial(with_pil, pixels, labels),
        V2: partial(one_by_one, torchvision, images),
        KORNIA: partial(kornia, images),
        OWN: partial(strong, images, masks),
    }
    if device().type == "cuda":
        compiled = stseg.StrongAugment()
        compiled.transform = torch.compile(compiled.transform, fullgraph=True)  # type: ignore[method-assign]
        ways |= {COMPILED: partial(compiled, images, masks), STEP: training_step(batch, side)}
    return seconds(ways, rounds=rounds)


def table(rows: list[dict[str, Any]]) -> str:
    """Format milliseconds, and the ratios of StrongAugment to the others."""
    names = list(rows[0]["seconds"])
    quickest = COMPILED if COMPILED in names else OWN
    ratios = [name for name in names if name not in (OWN, COMPILED)]
    heads = ["crop", "threads", *(f"{name}, ms" for name in names)]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|" + "---:|" * len(names)]
    for row in rows:
        cells = [f"{1000 * row['seconds'][name]:.1f}" for name in names]
        lines.append(f"| {row['side']} x {row['side']} | {row['threads']} | {' | '.join(cells)} |")
    lines += ["", f"| {quickest} takes, times | threads | {' | '.join(ratios)} |", "|---|---:|" + "---:|" * len(ratios)]
    for row in rows:
        cells = [f"{row['seconds'][quickest] / row['seconds'][name]:.2f}" for name in ratios]
        lines.append(f"| {row['side']} x {row['side']} | {row['threads']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print tables over crop sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each, of which the median counts")
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 321, 513], help="crops, in pixels")
    parser.add_argument("--threads", type=int, nargs="+", help="numbers of threads to try; default: that of torch")
    parser.add_argument("--publish", action="store_true", help=f"put the tables into {Path(SPEED).name}")
    options = parser.parse_args()
    all_threads = torch.get_num_threads()
    rows: list[dict[str, Any]] = []
    for threads in options.threads or [all_threads]:
        torch.set_num_threads(threads)
        rows += [
            {"side": side, "threads": threads, "seconds": measure(side, options.batch, options.rounds)}
            for side in options.sides
        ]
    torch.set_num_threads(all_threads)
    title = f"`python benchmarks/augmentation.py`: batches of {options.batch}, medians of {options.rounds} turns"
    text = f"{title}; {conditions()}.\n\n{table(rows)}"
    print(text)
    if options.publish:
        publish("augmentation", text, {"conditions": conditions(), "batch": options.batch, "rows": rows})


if __name__ == "__main__":
    main()
