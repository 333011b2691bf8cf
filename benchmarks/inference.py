"""Speed of labeling and ranking, compared with bare forward passes and with one image at a time, as in the paper.

    python benchmarks/inference.py

The floor is the network alone on batches that are ready. The images have three sizes, in random order.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from PIL import Image
from timing import conditions, device, seconds, table
from torch import Tensor, nn

import stseg

CLASSES, COUNT, BATCH = 21, 48, 8
TIMES = 8  # repetitions with a single view: the checksum of the weights is computed once
SIZES = ((96, 128), (128, 96), (128, 128))
SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)


def images() -> list[Tensor]:
    """Make uint8 images, equally many of each size, shuffled."""
    order = np.random.default_rng(0).permutation(COUNT)
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, *SIZES[index % 3]), dtype=torch.uint8, generator=generator)
        for index in order.tolist()
    ]


def ready_batches(data: list[Tensor]) -> list[Tensor]:
    """Stack images of equal size to batches on the device."""
    by_size = {size: [image for image in data if tuple(image.shape[1:]) == size] for size in SIZES}
    batches = [torch.stack(part[i : i + BATCH]) for part in by_size.values() for i in range(0, len(part), BATCH)]
    return [batch.to(device()) for batch in batches]


def ready_views(batches: list[Tensor]) -> list[Tensor]:
    """Make the inputs of ten views: every batch twice at each of five scales."""
    views = []
    for batch in batches:
        for scale in SCALES:
            size = [int(side * scale) for side in batch.shape[-2:]]
            views += [F.interpolate(batch.float() / 255, size, mode="bilinear", align_corners=True)] * 2
    return views


@torch.no_grad()
def one_at_a_time(network: nn.Module, data: list[Tensor], folder: Path, scales: tuple[float, ...]) -> None:
    """Label as in the paper: view by view, image by image, a PNG each."""
    for index, pixels in enumerate(data):
        image = pixels[None].to(device())
        height, width = image.shape[-2:]
        total = torch.zeros(1, CLASSES, height, width, device=device())
        for scale in scales:
            size = (int(height * scale), int(width * scale))
            view = F.interpolate(image.float() / 255, size, mode="bilinear", align_corners=True)
            for mirrored in (False, True):
                probability = network(view.flip(-1) if mirrored else view).softmax(1)
                probability = probability.flip(-1) if mirrored else probability
                total += F.interpolate(probability, (height, width), mode="bilinear", align_corners=True)
        mask = total.argmax(1)[0].to(torch.uint8).cpu().numpy()
        Image.fromarray(mask).save(folder / f"{index}.png")


@torch.no_grad()
def rank_one_at_a_time(networks: list[nn.Module], data: list[Tensor]) -> list[float]:
    """Rank as in the paper: a confusion matrix for each pair of masks, on the host."""
    scores = []
    for pixels in data:
        masks = [network(pixels[None].to(device())).argmax(1)[0].cpu().numpy() for network in networks]
        values = []
        for mask in masks[:-1]:
            cells = np.bincount((CLASSES * masks[-1] + mask).ravel(), minlength=CLASSES**2).reshape(CLASSES, CLASSES)
            common, union = np.diag(cells), cells.sum(0) + cells.sum(1) - np.diag(cells)
            values.append(float(np.mean(common[union > 0] / union[union > 0])))
        scores.append(float(np.mean(values)))
    return scores


def main() -> None:
    """Print three tables."""
    data: Any = images()  # a list is a data set as well
    batches = ready_batches(data)
    networks: list[nn.Module] = [
        stseg.Segmenter(smp.Unet("resnet18", encoder_weights=None, classes=CLASSES)).to(device()).eval()
        for _ in range(3)
    ]
    views = stseg.MultiScaleFlip(networks[0], SCALES)

    all_views = ready_views(batches)

    @torch.no_grad()
    def forward(batches: list[Tensor], *models: nn.Module) -> None:
        for batch in batches:
            for model in models:
                model(batch)

    def label(model: nn.Module, data: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            labeler = stseg.PseudoLabeler(model, num_classes=CLASSES, batch_size=BATCH, progress=False)
            labeler.label(data, folder)

    def label_one_at_a_time(scales: tuple[float, ...]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            one_at_a_time(networks[0], data, Path(folder), scales)

    ranker = stseg.StabilityRanker(networks, num_classes=CLASSES, batch_size=BATCH, progress=False)
    floor = "floor: bare forward passes"
    print(f"smp.Unet, ResNet-18, {COUNT * TIMES} images ({COUNT} with 10 views), batches of {BATCH}; {conditions()}\n")
    found = seconds(
        {
            floor: lambda: forward(batches * TIMES, networks[0]),
            "stseg: PseudoLabeler to PNG files": lambda: label(networks[0], data * TIMES),
        }
    )
    print(table("labeling at one scale", found, floor=floor, items=COUNT * TIMES), end="\n\n")
    found = seconds(
        {
            floor: lambda: forward(all_views, networks[0]),
            "stseg: PseudoLabeler to PNG files": lambda: label(views, data),
            "one image at a time": lambda: label_one_at_a_time(SCALES),
        },
        rounds=3,
    )
    print(table("labeling with 10 views", found, floor=floor, items=COUNT), end="\n\n")
    found = seconds(
        {
            floor: lambda: forward(batches * TIMES, *networks),
            "stseg: StabilityRanker": lambda: ranker.rank(data * TIMES),
            "one image at a time": lambda: rank_one_at_a_time(networks, data * TIMES),
        },
        rounds=3,
    )
    print(table("ranking by 3 checkpoints", found, floor=floor, items=COUNT * TIMES))


if __name__ == "__main__":
    main()
