"""Measure what a training step of each method costs, relative to supervised training of the same network.

    python benchmarks/methods.py

A step is the forward pass of the method, its backward pass, the optimizers and the averages, on 8 labeled and 8
unlabeled crops that are on the device already. The methods take turns. Counted are the images that go through any
encoder, with and without gradient; the numbers that a method holds, weights, averages and memories; and those kept from
the forward pass for the backward pass. ``--page`` puts the table between the page's ``cost-table`` marks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from pages import put
from timing import conditions, device, seconds
from torch import Tensor, nn

import stseg
from stseg import methods
from stseg.augment import BoxMix, CropPair

CLASSES = 21


def make_network(encoder: str) -> nn.Module:
    """Make a U-Net with random weights."""
    network: nn.Module = smp.Unet(encoder, encoder_weights=None, classes=CLASSES)
    return network


def ways(encoder: str, size: int) -> dict[str, stseg.Method]:
    """Make each method on networks of its own, for crops of ``size``."""

    def net() -> nn.Module:
        return make_network(encoder)

    channels = smp.encoders.get_encoder(encoder, weights=None).out_channels[-1]
    corrector = smp.Unet(encoder, encoder_weights=None, in_channels=3 + CLASSES, classes=CLASSES + 1)
    return {
        "supervised": methods.Supervised(net()),
        "FixMatch": methods.FixMatch(net()),
        "UniMatch": methods.UniMatch(net()),
        "UniMatch V2": methods.UniMatchV2(net()),
        "Mean Teacher": methods.MeanTeacher(net()),
        "CutMix-Seg": methods.CutMixSeg(net()),
        "ClassMix": methods.ClassMix(net()),
        "CPS": methods.CPS(net(), net()),
        "CPS with CutMix": methods.CPS(net(), net(), mix=BoxMix(area=(0.25, 0.5), boxes=3)),
        "GCT": methods.GCT(net(), net(), num_classes=CLASSES),
        "CCT": methods.CCT(net(), num_classes=CLASSES, channels=channels),
        "U2PL": methods.U2PL(net(), num_classes=CLASSES, channels=16),
        "DCC": methods.DCC(net(), channels=16, pairs=CropPair(size, base_size=size)),
        "AdvSSL": methods.AdvSSL(net(), num_classes=CLASSES),
        "S4GAN": methods.S4GAN(net(), num_classes=CLASSES),
        "ECS": methods.ECS(net(), corrector),
        "S4L": methods.S4L(net(), num_classes=CLASSES),
    }


def make_batch(method: stseg.Method, size: int, where: torch.device) -> stseg.Batch:
    """Make 8 labeled and 8 unlabeled crops, the latter as the method wants them."""
    unlabeled = None
    if method.uses_unlabeled:
        weak = stseg.WeakAugment(size, base_size=size)
        views = [method.view(torch.rand(3, size, size), weak)[0] for _ in range(8)]
        unlabeled = on(where, torch.utils.data.default_collate(views))
    return stseg.Batch(
        images=torch.rand(8, 3, size, size, device=where),
        masks=torch.randint(CLASSES, (8, size, size), device=where),
        is_pseudo=torch.zeros(8, dtype=torch.bool, device=where),
        unlabeled=unlabeled,
        step=10,
        steps=10,
    )


def on(where: torch.device, value: Any) -> Any:
    """Move a tensor, or those of a dictionary."""
    return {key: each.to(where) for key, each in value.items()} if isinstance(value, dict) else value.to(where)


def stepper(method: stseg.Method, batch: stseg.Batch) -> Callable[[], object]:
    """Return a function that does one training step."""
    optimizers = method.optimizers(stseg.TrainConfig(steps=1, optimizer="adamw", lr=1e-4))

    def step() -> None:
        losses = method(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.total.backward()
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(batch)

    return step


@dataclass
class Need:
    """What a step needs."""

    with_gradient: int = 0
    """Images through encoders."""
    without: int = 0
    held: int = 0
    """Numbers in the state of the method."""
    kept: int = 0
    """Bytes kept for the backward pass."""


def count(method: stseg.Method, batch: stseg.Batch) -> Need:
    """Count what a step needs."""
    need = Need(held=sum(value.numel() for value in method.state_dict().values()))
    kept: dict[int, int] = {}

    def note(encoder: nn.Module, images: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            need.with_gradient += len(images[0])
        else:
            need.without += len(images[0])

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    encoders = [module.encoder for module in method.modules() if isinstance(module, smp.base.SegmentationModel)]
    handles = [encoder.register_forward_pre_hook(note) for encoder in encoders]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = method(batch)
    need.kept = sum(kept.values())
    losses.total.backward()  # of another number than 0
    for handle in handles:
        handle.remove()
    return need


def main() -> None:
    """Measure all methods in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--page", type=Path, help="a Markdown page with the marks cost-table")
    options = parser.parse_args()
    torch.manual_seed(0)
    where = device()
    made = {name: method.to(where).train() for name, method in ways(options.encoder, options.size).items()}
    batches = {name: make_batch(method, options.size, where) for name, method in made.items()}
    for name, method in made.items():
        method(batches[name])  # in its first call a network is tried for the sizes that it takes
    needs = {name: count(method, batches[name]) for name, method in made.items()}
    found = seconds({name: stepper(method, batches[name]) for name, method in made.items()}, rounds=options.rounds)
    least, floor = needs["supervised"], found["supervised"]
    lines = [
        "| Method | images with gradient | without | numbers held | kept for the backward pass | time of a step |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, need in needs.items():
        ratios = (need.held / least.held, need.kept / least.kept, found[name] / floor)
        cells = [name, str(need.with_gradient), str(need.without), *(f"{ratio:.1f}" for ratio in ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"U-Net with {options.encoder}, crops of {options.size}, {CLASSES} classes. {conditions()}."
    lines += ["", f"The last three columns are multiples of supervised training. {about}"]
    print("\n".join(lines))
    if options.page:
        put(options.page, "cost-table", "\n".join(lines))


if __name__ == "__main__":
    main()
