"""Parts shared by the experiments of papers: options, a run of SelfTrainer, printed results."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, Subset

import stseg
from stseg.data import ListedFiles, split_ids

SETTINGS = ("epochs", "steps", "batch_size", "num_workers", "seed")  # override those of the config, where given


class Listed(Protocol):
    """Makes a data set of a list: ``listed(root, names, part, masks_of, masks=...)``.

    ``names`` is a file, or None for all images of ``part``, ``"train"`` or ``"val"``; ``masks_of`` is ``--masks``.
    """

    def __call__(
        self, root: Path, names: Path | None, part: str, masks_of: str, *, masks: bool = True
    ) -> ListedFiles: ...


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options of every experiment."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data")
    parser.add_argument("--out", type=Path, required=True, help="work directory: weights, masks, ranking, report")
    parser.add_argument("--method", choices=("supervised", "st", "st++"), default="st++")
    parser.add_argument("--keep", choices=("final", "best"), default="final", help="best on val: for parity alone")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: faster where the hardware supports it")
    for name in SETTINGS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS, help="of TrainConfig")
    return parser


def paper_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options of the experiments of ST++: lists, and the networks of the paper."""
    parser = parser_of(description)
    parser.add_argument("--labeled", type=Path, required=True, help="list of the labeled images")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--unlabeled", type=Path, help="list of the others, for st and st++")
    others.add_argument("--fraction", type=Fraction, help="draw this share of --labeled; the rest is unlabeled")
    parser.add_argument("--val", type=Path, help="list to evaluate on; default: the validation images of the data set")
    parser.add_argument("--network", choices=("PSPNet", "DeepLabV3Plus", "DeepLabV2"), default="DeepLabV3Plus")
    parser.add_argument("--backbone", help="a timm model; default: resnet50, and resnet101 for DeepLabV2")
    parser.add_argument("--pretrained", action="store_true", help="ImageNet weights (the paper's DeepLabV2: COCO)")
    parser.add_argument("--crop-size", type=int, help="of the weak augmentation")
    return parser


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of :class:`stseg.TrainConfig` that were given."""
    given = {name: value for name, value in vars(args).items() if name in SETTINGS}
    return {**given, "precision": "bf16" if args.bf16 else "fp32"}


def run_paper(
    args: argparse.Namespace,
    listed: Listed,
    *,
    classes: Sequence[str],
    config: Callable[..., stseg.TrainConfig],
    **settings: Any,
) -> None:
    """Train and evaluate as the paper does, with the options of ``paper_parser`` and ``--masks``.

    Args:
        args: the options.
        listed: makes a data set of a list.
        classes: the name of each class.
        config: makes the settings, such as ``stseg.TrainConfig.pascal``.
        settings: further ones.
    """
    settings |= settings_of(args) | {"head_lr_factor": 1 if args.network == "DeepLabV2" else 10}
    chosen = config(**settings)
    if args.crop_size is not None:
        assert isinstance(chosen.weak, stseg.WeakAugment)
        chosen = replace(chosen, weak=replace(chosen.weak, crop_size=args.crop_size))
    labeled: Dataset[Any] = listed(args.data, args.labeled, "train", args.masks)
    unlabeled: Dataset[Any] | None = None
    if args.unlabeled or args.fraction:
        unlabeled = listed(args.data, args.unlabeled or args.labeled, "train", args.masks, masks=False)
    if args.fraction:
        labeled, unlabeled = draw(labeled, unlabeled, float(args.fraction), seed=chosen.seed)
    backbone = args.backbone or ("resnet101" if args.network == "DeepLabV2" else "resnet50")
    if args.pretrained and backbone in ("resnet50", "resnet101"):
        backbone += ".tv_in1k"  # torchvision's weights, from which the paper starts

    def make_network() -> nn.Module:
        return getattr(stseg.models, args.network)(backbone, num_classes=len(classes), pretrained=args.pretrained)

    val = listed(args.data, args.val, "val", args.masks)
    run(args, make_network, (labeled, unlabeled, val), classes=classes, config=chosen)


def draw(labeled: Any, unlabeled: Any, fraction: float, *, seed: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """Draw a share of a data set with masks; return it, and the others from the same data set without masks."""
    drawn = set(split_ids(labeled.ids, fraction, seed=seed)[0])
    few = [index for index, id in enumerate(labeled.ids) if id in drawn]
    others = [index for index, id in enumerate(unlabeled.ids) if id not in drawn]
    return Subset(labeled, few), Subset(unlabeled, others)


def run(
    args: argparse.Namespace,
    make_network: Callable[[], nn.Module],
    data: tuple[Dataset[Any], Dataset[Any] | None, Dataset[Any]],
    *,
    classes: Sequence[str],
    config: stseg.TrainConfig,
) -> None:
    """Train by ``--method``; evaluate every stage on whole images, at one scale; print the results.

    Args:
        args: the options of ``parser_of``.
        make_network: makes a fresh network.
        data: labeled, unlabeled and validation images.
        classes: the name of each class.
        config: settings of every stage.
    """
    labeled, unlabeled, val = data
    trainer = stseg.SelfTrainer(
        make_network,
        num_classes=len(classes),
        config=config,
        method=args.method,
        keep=args.keep,
        workdir=args.out,
    )
    result = trainer.fit(labeled, unlabeled, val)
    first_process = not dist.is_initialized() or dist.get_rank() == 0
    for name, stage in result.stages.items():
        stage.model.to(next(result.model.parameters()).device)
        metric = stseg.evaluate(stage.model, val, num_classes=len(classes), num_workers=config.num_workers)
        if first_process:
            print(f"{name}: mIoU {100 * metric.compute():.2f}")
    if first_process:
        print("\n".join(f"{100 * iou:6.2f}  {c}" for c, iou in zip(classes, metric.iou().tolist(), strict=True)))
        print(stseg.write_report(result, args.out, class_names=classes))
