"""Measure what a training step of each method costs, relative to supervised training of the same network.

    python benchmarks/methods.py

A step is the forward pass of the method, its backward pass, the optimizers and the averages, on 8 labeled and 8
unlabeled crops that are on the device already. The methods take turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import segmentation_models_pytorch as smp
import torch
from timing import conditions, device, seconds
from torch import nn

import stseg
from stseg import methods
from stseg.augment import BoxMix

CLASSES = 21


def make_network(encoder: str) -> nn.Module:
    """Make a U-Net with random weights."""
    network: nn.Module = smp.Unet(encoder, encoder_weights=None, classes=CLASSES)
    return network


def ways(encoder: str) -> dict[str, stseg.Method]:
    """Make each method on networks of its own."""

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
        "U2PL": methods.U2PL(net(), num_classes=CLASSES, channels=16, memory=1000),
        "CCT": methods.CCT(net(), num_classes=CLASSES, channels=channels),
        "AdvSSL": methods.AdvSSL(net(), num_classes=CLASSES),
        "S4GAN": methods.S4GAN(net(), num_classes=CLASSES),
        "ECS": methods.ECS(net(), corrector),
        "S4L": methods.S4L(net(), num_classes=CLASSES),
    }


def stepper(method: stseg.Method, size: int, where: torch.device) -> Callable[[], object]:
    """Return a function that does one training step."""
    method.to(where).train()
    optimizers = method.optimizers(stseg.TrainConfig(steps=1, optimizer="adamw", lr=1e-4))
    images, masks = torch.rand(8, 3, size, size, device=where), torch.randint(CLASSES, (8, size, size), device=where)
    batch = stseg.Batch(
        images=images,
        masks=masks,
        is_pseudo=torch.zeros(8, dtype=torch.bool, device=where),
        unlabeled=torch.rand(8, 3, size, size, device=where) if method.uses_unlabeled else None,
        step=10,
        steps=10,
    )

    def step() -> None:
        losses = method(batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses.total.backward()
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(batch)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    where = device()
    made = ways(options.encoder)
    print(f"{conditions()}, {options.encoder}, crops of {options.size}")
    weights = {name: sum(p.numel() for p in method.parameters()) for name, method in made.items()}
    found = seconds({name: stepper(m, options.size, where) for name, m in made.items()}, rounds=options.rounds)
    for name, value in found.items():
        floor, least = found["supervised"], weights["supervised"]
        print(f"| {name} | {weights[name] / least:.1f} | {value / floor:.1f} |")


if __name__ == "__main__":
    main()
