"""Speed of labeling and ranking, beside bare forward passes and beside the way of the paper's code.

    python benchmarks/inference.py             prints the tables
    python benchmarks/inference.py --publish   and puts them into docs/speed.md and results/inference.json

Everything is measured on JPEG files of 360 x 480 pixels and, for labels, up to the PNG files. The floor is the network
alone: the precision and the layout that ``"auto"`` uses, tensors that are ready, one or eight images a pass, whichever
is faster. The paper's code reads one image after the other, computes in float32 and channels first, and takes softmax
and mIoU one by one.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from pages import publish
from PIL import Image
from timing import conditions, device, seconds, table
from torch import Tensor, nn

import stseg
from stseg.data import SegmentationFolder, SyntheticScenes

CLASSES, HEIGHT, WIDTH, STRIDE = 21, 360, 480, 32
COUNT, COUNT_OF_VIEWS, ROUNDS = 24, 2, 4
SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)
FLOOR = "floor: bare forward passes"
PAPER = "the paper's way, one image at a time"


def make_files(folder: Path, count: int) -> None:
    """Write JPEG files of random smooth scenes."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for index in range(count):
        coarse = torch.rand(1, 3, 12, 16, generator=generator)
        scene = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic").clamp(0, 1) * 255
        Image.fromarray(scene[0].byte().permute(1, 2, 0).numpy()).save(folder / f"{index:03d}.jpg", quality=92)


def make_networks() -> list[nn.Module]:
    """Make three networks with random weights, channels first."""
    torch.manual_seed(0)
    return [smp.Unet("resnet18", encoder_weights=None, classes=CLASSES).to(device()).eval() for _ in range(3)]


# --- the way of the paper's code


def read(path: Path) -> Tensor:
    """Read and normalize an image, and pad it to a size that the network takes."""
    pixels = np.array(Image.open(path).convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return padded((image - mean) / std).to(device())


def padded(image: Tensor) -> Tensor:
    """Pad right and bottom to multiples of the stride."""
    bottom, right = (-side % STRIDE for side in image.shape[-2:])
    return F.pad(image, (0, right, 0, bottom), mode="replicate")


@torch.no_grad()
def label_as_paper(network: nn.Module, files: list[Path], out: Path) -> None:
    """Label at one scale."""
    for path in files:
        probability = network(read(path)).softmax(1)[..., :HEIGHT, :WIDTH]
        mask = probability.argmax(1)[0].cpu().numpy().astype(np.uint8)
        Image.fromarray(mask).save(out / f"{path.stem}.png")


@torch.no_grad()
def label_views_as_paper(network: nn.Module, files: list[Path], out: Path) -> None:
    """Label by ten views, one after the other."""
    for path in files:
        image = read(path)[..., :HEIGHT, :WIDTH]
        total = torch.zeros(1, CLASSES, HEIGHT, WIDTH, device=device())
        for scale in SCALES:
            height, width = int(HEIGHT * scale), int(WIDTH * scale)
            view = F.interpolate(image, (height, width), mode="bilinear", align_corners=True)
            for mirrored in (False, True):
                logits = network(padded(view.flip(-1) if mirrored else view))[..., :height, :width]
                probability = logits.softmax(1).flip(-1) if mirrored else logits.softmax(1)
                total += F.interpolate(probability, (HEIGHT, WIDTH), mode="bilinear", align_corners=True)
        mask = total.argmax(1)[0].cpu().numpy().astype(np.uint8)
        Image.fromarray(mask).save(out / f"{path.stem}.png")


@torch.no_grad()
def rank_as_paper(networks: list[nn.Module], files: list[Path]) -> list[float]:
    """Rank by a confusion matrix for each pair of masks, on the host."""
    scores = []
    for path in files:
        image = read(path)
        masks = [net(image).softmax(1).argmax(1)[0, :HEIGHT, :WIDTH].cpu().numpy() for net in networks]
        values = []
        for mask in masks[:-1]:
            cells = np.bincount((CLASSES * masks[-1] + mask).ravel(), minlength=CLASSES**2).reshape(CLASSES, CLASSES)
            common, union = np.diag(cells), cells.sum(0) + cells.sum(1) - np.diag(cells)
            values.append(float(np.mean(common[union > 0] / union[union > 0])))
        scores.append(float(np.mean(values)))
    return scores


# --- the floor


def floor_of(networks: list[nn.Module], sizes: list[tuple[int, int]], images: int) -> tuple[Callable[[], None], str]:
    """Return bare forward passes of all networks for each size, with one or eight images a pass, whichever is faster.

    Args:
        networks: laid out as they run fastest.
        sizes: height and width of the inputs.
        images: how many images of each size.
    """
    precision = stseg.PseudoLabeler(networks[0], num_classes=CLASSES, progress=False).precision

    @torch.no_grad()
    def forward(size: tuple[int, int], count: int, total: int, models: list[nn.Module]) -> None:
        batch = batches[size][:count]
        with torch.autocast(device().type, torch.bfloat16, enabled=precision == "bf16"):
            for model in models:
                for _ in range(0, total, count):
                    model(batch)

    batches = {size: torch.rand(8, 3, *size, device=device()) for size in sizes}
    best = {}
    for size in sizes:
        found = seconds(
            {str(count): partial(forward, size, count, 8, networks[:1]) for count in (1, 8)},
            rounds=5,
            of=min,
        )
        best[size] = int(min(found, key=lambda name: found[name]))

    def run() -> None:
        for size in sizes:
            forward(size, best[size], images, networks)

    text = ", ".join(map(str, dict.fromkeys(best.values())))
    return run, f"{precision}, channels_last, {text} images a pass"


# --- what bfloat16 changes


def changed_pixels() -> dict[str, float]:
    """Train a network on drawn scenes; return the share of pixels that bfloat16 labels otherwise, and the mIoU."""
    torch.manual_seed(0)
    network = smp.Unet("resnet18", encoder_weights=None, classes=7)
    config = stseg.TrainConfig(steps=400, batch_size=8, weak=stseg.WeakAugment((96, 128)), optimizer="adamw", lr=1e-3)
    scenes, held_out = SyntheticScenes(64, size=(96, 128), seed=1), SyntheticScenes(64, size=(96, 128), seed=2)
    model = stseg.fit(network, scenes, config, progress=False).model
    labels = {
        precision: stseg.PseudoLabeler(model, num_classes=7, precision=precision, progress=False).label(held_out)
        for precision in ("fp32", "bf16")
    }
    pairs = [(labels["fp32"][index][1], labels["bf16"][index][1]) for index in range(len(held_out))]
    changed = sum(int((one != other).sum()) for one, other in pairs) / sum(one.numel() for one, _ in pairs)
    miou = {
        f"mIoU, {name}": stseg.evaluate(model, held_out, num_classes=7, precision=name, progress=False).compute()
        for name in ("fp32", "bf16")
    }
    return {"changed": changed, **miou}


def main() -> None:
    """Measure and print the tables; with ``--publish``, put them into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true", help="put the tables into docs/speed.md")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    figures: dict[str, object] = {}
    parts: list[str] = []

    def measure(title: str, ways: dict[str, Callable[[], object]], items: int, note: str) -> None:
        found = seconds(ways, rounds=args.rounds, of=min)
        figures[title] = {"seconds": found, "images": items, "floor": note}
        ratio = ", ".join(f"{found[PAPER] / value:.1f}" for name, value in found.items() if name.startswith("stseg"))
        parts.append(table(title, found, floor=FLOOR, items=items))
        parts.append(f"Floor: {note}. The paper's way takes {ratio} times as long as stseg.")
        print("\n\n".join(parts[-2:]), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        make_files(Path(folder, "images"), COUNT)
        data = SegmentationFolder(Path(folder, "images"))
        files = [Path(folder, "images", f"{id}.jpg") for id in data.ids]
        theirs = make_networks()
        fast = [copy.deepcopy(network).to(memory_format=torch.channels_last) for network in theirs]
        ours = [stseg.Segmenter(copy.deepcopy(network), stride=STRIDE) for network in theirs]
        views = stseg.MultiScaleFlip(ours[0], SCALES)
        few = torch.utils.data.Subset(data, range(COUNT_OF_VIEWS))

        def to_files(label: Callable[[Path], object]) -> Callable[[], None]:
            def run() -> None:
                with tempfile.TemporaryDirectory() as out:
                    label(Path(out))

            return run

        def labeler(model: nn.Module, precision: stseg.types.Precision) -> stseg.PseudoLabeler:
            return stseg.PseudoLabeler(model, num_classes=CLASSES, precision=precision, progress=False)

        def ranker(precision: stseg.types.Precision) -> stseg.StabilityRanker:
            return stseg.StabilityRanker(ours, num_classes=CLASSES, precision=precision, progress=False)

        size = (-(-HEIGHT // STRIDE) * STRIDE, WIDTH)
        floor, note = floor_of(fast[:1], [size], COUNT)
        measure(
            "labeling at one scale",
            {
                FLOOR: floor,
                "stseg: PseudoLabeler, auto": to_files(lambda out: labeler(ours[0], "auto").label(data, out)),
                "stseg: PseudoLabeler, fp32": to_files(lambda out: labeler(ours[0], "fp32").label(data, out)),
                PAPER: to_files(lambda out: label_as_paper(theirs[0], files, out)),
            },
            COUNT,
            note,
        )
        floor, note = floor_of(fast, [size], COUNT)
        measure(
            "ranking by 3 checkpoints",
            {
                FLOOR: floor,
                "stseg: StabilityRanker, auto": lambda: ranker("auto").rank(data),
                "stseg: StabilityRanker, fp32": lambda: ranker("fp32").rank(data),
                PAPER: lambda: rank_as_paper(theirs, files),
            },
            COUNT,
            note,
        )
        sizes = [(-(-int(HEIGHT * s) // STRIDE) * STRIDE, -(-int(WIDTH * s) // STRIDE) * STRIDE) for s in SCALES]
        floor, note = floor_of(fast[:1], sizes, 2 * COUNT_OF_VIEWS)
        measure(
            "labeling with 10 views",
            {
                FLOOR: floor,
                "stseg: PseudoLabeler, auto": to_files(lambda out: labeler(views, "auto").label(few, out)),
                "stseg: PseudoLabeler, fp32": to_files(lambda out: labeler(views, "fp32").label(few, out)),
                PAPER: to_files(lambda out: label_views_as_paper(theirs[0], files[:COUNT_OF_VIEWS], out)),
            },
            COUNT_OF_VIEWS,
            note,
        )
    figures["precision"] = found = changed_pixels()
    parts.append(
        f"By a network trained on drawn scenes, bfloat16 labels {found['changed']:.2%} of the pixels of other scenes "
        f"otherwise than float32; the mIoU is {found['mIoU, bf16']:.4f} in place of {found['mIoU, fp32']:.4f}."
    )
    print(f"\n{parts[-1]}")
    if args.publish:
        how = (
            f"`python benchmarks/inference.py --publish`: smp.Unet, ResNet-18, {CLASSES} classes, {COUNT} JPEG files "
            f"of {HEIGHT} x {WIDTH} pixels ({COUNT_OF_VIEWS} with 10 views), the fastest of {args.rounds} rounds; "
            f"{conditions()}."
        )
        publish("inference", "\n\n".join([how, *parts]), {"conditions": conditions(), **figures})


if __name__ == "__main__":
    main()
