"""Measure training: what `stseg.fit` adds to a bare loop, what its defaults gain, and a step of each method.

    python benchmarks/training.py --publish

The floor is a loop of plain PyTorch on batches that are ready on the device, with the network, loss, fused optimizer,
precision and memory layout of `stseg.fit`. That reads images from memory: of the size of the crops and as they are, or
of 360 x 480 with the weak augmentation. The time of a step is the mean from one step to the next, so that what comes
before the first step (validation of the data, a trial of the step) does not count. What is compared takes turns, and
ratios are medians over the turns. On a CPU the clock is the processor time of the process, so that other programs count
less; it counts all threads. ``--publish`` writes the tables to docs/speed.md and results/training.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import methods as of_methods
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from pages import publish
from timing import conditions, device, synchronize
from torch import Tensor, nn

import stseg
from stseg.methods import Supervised

CLASSES, BATCH, WARMUP = 21, 8, 3
LARGE = (360, 480)
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}

clock = time.perf_counter if torch.cuda.is_available() else time.process_time


@dataclass(frozen=True)
class Case:
    """A network and the crops that it is trained on."""

    name: str
    make: Callable[[], nn.Module]
    size: int
    steps: int
    """Steps of a turn."""


def maker(kind: Any, encoder: str, **options: Any) -> Callable[[], nn.Module]:
    """Return a function that makes a network with random weights."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        network: nn.Module = kind(encoder, encoder_weights=None, classes=CLASSES, **options)
        return network

    return make


SMALL = Case(
    "small U-Net of the examples",
    maker(smp.Unet, "tu-test_resnet", encoder_depth=3, decoder_channels=(64, 32, 16)),
    size=48,
    steps=40,
)
LITE = Case("U-Net, EfficientNet-Lite0", maker(smp.Unet, "timm-tf_efficientnet_lite0"), size=128, steps=6)
UNET = Case("U-Net, ResNet-18", maker(smp.Unet, "resnet18"), size=192, steps=4)
DEEPLAB = Case("DeepLabV3+, ResNet-50", maker(smp.DeepLabV3Plus, "resnet50"), size=192, steps=3)


class Clocked(Supervised):
    """Supervised training that notes when each step ends."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self._ends: list[float] = []

    def after_step(self, batch: stseg.Batch) -> None:
        """Note the time."""
        self._ends.append(clock())


def time_of_step(ends: Sequence[float]) -> float:
    """Return the mean time from one step to the next, without the first ones."""
    return (ends[-1] - ends[WARMUP]) / (len(ends) - 1 - WARMUP)


def fit(case: Case, size: tuple[int, int], **settings: Any) -> float:
    """Train by stseg on images of a size in memory; return the time of a step."""
    generator, steps = torch.Generator().manual_seed(0), case.steps + WARMUP + 1

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, dtype=torch.uint8, generator=generator)

    pairs: Any = [(draw(256, 3, *size), draw(CLASSES, *size)) for _ in range(2 * BATCH)]
    config = stseg.TrainConfig(steps=steps, batch_size=BATCH, eval_every=steps, lr=1e-4, **settings)
    method = Clocked(case.make())
    stseg.fit(method, pairs, config, progress=False)
    return time_of_step(method._ends)


def bare(case: Case, precision: Literal["fp32", "bf16"], layout: str) -> float:
    """Train by a loop of plain PyTorch on ready batches; return the time of a step."""
    where, generator = device(), torch.Generator().manual_seed(0)
    model = case.make().to(where).to(memory_format=LAYOUTS[layout]).train()
    images = torch.randn(BATCH, 3, case.size, case.size, generator=generator).to(where)
    masks = torch.randint(CLASSES, images[:, 0].shape, generator=generator).to(where)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4, fused=True)
    ends = []
    for _ in range(case.steps + WARMUP + 1):
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), masks, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        ends.append(clock())
    synchronize()
    return time_of_step(ends)


def in_turns(ways: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure all ways in turns."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


def ratio(values: Iterable[float], floors: Iterable[float]) -> float:
    """Return the median of the ratios of each turn."""
    return statistics.median(value / floor for value, floor in zip(values, floors, strict=True))


def above_the_floor(rounds: int) -> tuple[list[str], dict[str, Any]]:
    """Compare `stseg.fit` with a bare loop, both in float32 as laid out by default."""
    lines = [
        "| network | crops | bare loop | `stseg.fit`, ready images | with weak augmentation |",
        "|---|---:|---:|---:|---:|",
    ]
    figures = {}
    layout = layout_of_fit()
    for case in (SMALL, LITE, UNET):
        side, weak = (case.size, case.size), stseg.WeakAugment(case.size)
        found = in_turns(
            {
                "bare": partial(bare, case, "fp32", layout),
                "ready": partial(fit, case, side, weak=None, precision="fp32"),
                "weak": partial(fit, case, LARGE, weak=weak, precision="fp32"),
            },
            rounds,
        )
        figures[case.name] = found
        ready, augmented = (ratio(found[name], found["bare"]) for name in ("ready", "weak"))
        floor = 1000 * statistics.median(found["bare"])
        lines.append(f"| {case.name} | {case.size} | {floor:.1f} ms | {ready:.3f} | {augmented:.3f} |")
        print(lines[-1], flush=True)
    return lines, figures


def layout_of_fit() -> str:
    """Return how `stseg.fit` lays out the weights of convolutions."""
    network = nn.Conv2d(3, 2, 3, padding=1)
    pair = torch.rand(3, 16, 16), torch.arange(256).view(16, 16) % 2
    stseg.fit(network, [pair] * 2, stseg.TrainConfig(steps=1, batch_size=2, weak=None), progress=False)  # type: ignore[arg-type]
    return "NHWC" if network.weight.is_contiguous(memory_format=torch.channels_last) else "NCHW"


def defaults(rounds: int) -> tuple[list[str], dict[str, Any]]:
    """Compare bfloat16 and memory layouts in bare loops."""
    lines = [
        "| network | crops | fp32, NCHW | fp32, NHWC | bf16, NCHW | bf16, NHWC |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    figures = {}
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    for case in (UNET, LITE, DEEPLAB):
        ways = [(precision, layout) for precision in precisions for layout in LAYOUTS]
        found = in_turns({", ".join(way): partial(bare, case, *way) for way in ways}, rounds)
        figures[case.name] = found
        first, *others = found.values()
        cells = [f"{1000 * statistics.median(first):.0f} ms", *(f"{ratio(other, first):.2f}" for other in others)]
        lines.append(f"| {case.name} | {case.size} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return lines, figures


def steps_of_methods(rounds: int, *, encoder: str = "resnet18", size: int = 96) -> tuple[list[str], dict[str, Any]]:
    """Compare a step of each method with the images that it sends through networks, with and without gradient."""
    torch.manual_seed(0)
    where = device()
    made = {name: method.to(where).train() for name, method in of_methods.ways(encoder, size).items()}
    batches = {name: of_methods.make_batch(method, size, where) for name, method in made.items()}
    for name, method in made.items():
        method(batches[name])  # in its first call a network is tried for the sizes that it takes
    needs = {name: of_methods.count(method, batches[name]) for name, method in made.items()}
    steps = {name: of_methods.stepper(method, batches[name]) for name, method in made.items()}

    def timed(step: Callable[[], object]) -> float:
        synchronize()
        began = clock()
        step()
        synchronize()
        return clock() - began

    ways = {name: partial(timed, step) for name, step in steps.items()}
    in_turns(ways, 1)
    found = in_turns(ways, rounds)
    lines = ["| method | expected | a step | step / expected |", "|---|---:|---:|---:|"]
    least = needs["supervised"]
    for name, need in needs.items():
        expected = (3 * need.with_gradient + need.without) / (3 * least.with_gradient)
        measured = ratio(found[name], found["supervised"])
        lines.append(f"| {name} | {expected:.2f} | {measured:.2f} | {measured / expected:.2f} |")
        print(lines[-1], flush=True)
    return lines, found


def main() -> None:
    """Measure all in turns and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parts", nargs="+", default=["fit", "defaults", "methods"])
    parser.add_argument("--publish", action="store_true", help="write the tables and figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = {"fit": above_the_floor, "defaults": defaults, "methods": steps_of_methods}
    text, figures = [], {}
    for name in options.parts:
        lines, figures[name] = parts[name](options.rounds)
        text += [*lines, ""]
    about = f"`python benchmarks/training.py`: batches of {BATCH}, {CLASSES} classes; {conditions()}."
    print("\n".join([about, "", *text]))
    if options.publish:
        publish("training", "\n".join([about, "", *text]), {"conditions": conditions(), **figures})


if __name__ == "__main__":
    main()
