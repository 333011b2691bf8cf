r"""The paper's experiments on Cityscapes (Yang et al., CVPR 2022, section 4): supervised, ST or ST++.

    python examples/cityscapes.py --data cityscapes --pretrained --out runs/cityscapes \
        --labeled 1_8/labeled.txt --unlabeled 1_8/unlabeled.txt

A list has on each line an image and its mask, ``leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png``, or an id, ``aachen_000000_000019``. Masks of
unlabeled images need not exist. ``torchrun --nproc-per-node 4`` in place of ``python`` shares the work between four
GPUs. A run that was killed goes on when started again.
"""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, Subset

import stseg
from stseg.data import FilePair, ListedFiles, read_pairs, split_ids

# By the value in `labelIds` masks, in the order of the classes that are evaluated; all others are ignored.
LABELS = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"}
LABELS |= {20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"}
LABELS |= {27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
CLASSES = tuple(LABELS.values())
SETTINGS = ("epochs", "steps", "crop_size", "batch_size", "num_workers", "seed")  # in place of the paper's


def parse() -> argparse.Namespace:
    """What the paper varies, and what hardware asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of leftImg8bit and gtFine")
    parser.add_argument("--labeled", type=Path, required=True, help="list of the labeled images")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--unlabeled", type=Path, help="list of the others, for st and st++")
    others.add_argument("--fraction", type=Fraction, help="draw such a share of --labeled; the rest is unlabeled")
    parser.add_argument("--val", type=Path, help="list to evaluate on; default: all of leftImg8bit/val")
    parser.add_argument("--masks", choices=("labelIds", "labelTrainIds"), default="labelIds", help="those of ids")
    parser.add_argument("--out", type=Path, required=True, help="work directory: weights, masks, ranking, report")
    parser.add_argument("--method", choices=("supervised", "st", "st++"), default="st++")
    parser.add_argument("--teacher", choices=("final", "best"), default="final", help="best on val: for parity alone")
    parser.add_argument("--network", choices=("PSPNet", "DeepLabV3Plus", "DeepLabV2"), default="DeepLabV3Plus")
    parser.add_argument("--backbone", help="a timm model; default: resnet50, and resnet101 for DeepLabV2")
    parser.add_argument("--pretrained", action="store_true", help="ImageNet weights (the paper's DeepLabV2: COCO)")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: faster where the hardware has it")
    for name in SETTINGS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS, help="of TrainConfig")
    return parser.parse_args()


def files_of(line: FilePair, part: str, kind: str) -> FilePair:
    """The files that a line names, or those of its id, which may have folders before it: ``train/aachen/``."""
    if line.mask is not None:
        return line
    *folders, name = line.image.removesuffix(".png").removesuffix("_leftImg8bit").split("/")
    city = folders[-1] if folders else name.split("_")[0]
    folder = f"{folders[-2] if len(folders) > 1 else part}/{city}/{name}"
    return line._replace(image=f"leftImg8bit/{folder}_leftImg8bit.png", mask=f"gtFine/{folder}_gtFine_{kind}.png")


def listed(root: Path, names: Path | None, part: str, kind: str, *, masks: bool = True) -> ListedFiles:
    """The images of a list, or all of a part of the data; ``labelIds`` are mapped to the classes."""
    found = (FilePair(path.stem) for path in sorted((root / "leftImg8bit" / part).glob("*/*_leftImg8bit.png")))
    pairs = [files_of(line, part, kind) for line in (found if names is None else read_pairs(names))]
    raw = {str(pair.mask).endswith("_labelIds.png") for pair in pairs} if masks else {False}
    if len(raw) > 1:
        raise SystemExit(f"{names} names labelIds and other masks; expected one kind of them")
    class_map = {value: index for index, value in enumerate(LABELS)} if raw == {True} else None
    return ListedFiles(root, pairs, masks=masks, class_map=class_map)


def main() -> None:
    """Train, evaluate every stage at full resolution and one scale, write everything to the work directory."""
    args = parse()
    everything = listed(args.data, args.labeled, "train", args.masks)
    labeled: Dataset[Any] = everything
    unlabeled: Dataset[Any] | None = None
    if args.unlabeled:
        unlabeled = listed(args.data, args.unlabeled, "train", args.masks, masks=False)
    val = listed(args.data, args.val, "val", args.masks)
    config = stseg.TrainConfig.cityscapes(
        head_lr_factor=1 if args.network == "DeepLabV2" else 10,
        precision="bf16" if args.bf16 else "fp32",
        **{name: value for name, value in vars(args).items() if name in SETTINGS},
    )
    if args.fraction:
        drawn = set(split_ids(everything.ids, float(args.fraction), seed=config.seed)[0])
        without_masks = listed(args.data, args.labeled, "train", args.masks, masks=False)
        labeled = Subset(everything, [i for i, id in enumerate(everything.ids) if id in drawn])
        unlabeled = Subset(without_masks, [i for i, id in enumerate(everything.ids) if id not in drawn])
    backbone = args.backbone or ("resnet101" if args.network == "DeepLabV2" else "resnet50")
    if args.pretrained and backbone in ("resnet50", "resnet101"):
        backbone += ".tv_in1k"  # torchvision's weights, from which the paper starts

    def make_network() -> nn.Module:
        return getattr(stseg.models, args.network)(backbone, num_classes=len(CLASSES), pretrained=args.pretrained)

    trainer = stseg.SelfTrainer(
        make_network,
        num_classes=len(CLASSES),
        config=config,
        method=args.method,
        teacher=args.teacher,
        inference_batch_size=2,  # of 2 megapixels, which labeling sees at twice the size too
        workdir=args.out,
    )
    result = trainer.fit(labeled, unlabeled, val)
    first_process = not dist.is_initialized() or dist.get_rank() == 0
    for name, stage in result.stages.items():
        stage.model.to(next(result.model.parameters()).device)
        metric = stseg.evaluate(stage.model, val, num_classes=len(CLASSES), num_workers=config.num_workers)
        if first_process:
            print(f"{name}: mIoU {100 * metric.compute():.2f}")
    if first_process:
        print("\n".join(f"{100 * iou:6.2f}  {c}" for c, iou in zip(CLASSES, metric.iou().tolist(), strict=True)))
        print(stseg.write_report(result, args.out, class_names=CLASSES))


if __name__ == "__main__":
    main()
