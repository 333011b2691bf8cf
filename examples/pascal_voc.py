r"""The paper's experiments on Pascal VOC 2012 (Yang et al., CVPR 2022, section 4): supervised, ST or ST++.

    python examples/pascal_voc.py --data VOCdevkit/VOC2012 --pretrained --out runs/pascal \
        --labeled 1_8/labeled.txt --unlabeled 1_8/unlabeled.txt

A list has on each line an image and its mask, ``JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png``, or an
id, ``2007_000032``. Masks of unlabeled images need not exist. ``torchrun --nproc-per-node 4`` in place of ``python``
shares the work between four GPUs. A run that was killed goes on when started again.
"""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, Subset

import stseg
from stseg.data import ListedFiles, read_pairs, split_ids

CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
)
SETTINGS = ("epochs", "steps", "crop_size", "batch_size", "num_workers", "seed")  # in place of the paper's


def parse() -> argparse.Namespace:
    """What the paper varies, and what hardware asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="VOC2012, with JPEGImages and SegmentationClass")
    parser.add_argument("--labeled", type=Path, required=True, help="list of the labeled images")
    others = parser.add_mutually_exclusive_group()
    others.add_argument("--unlabeled", type=Path, help="list of the others, for st and st++")
    others.add_argument("--fraction", type=Fraction, help="draw such a share of --labeled; the rest is unlabeled")
    parser.add_argument("--val", type=Path, help="list to evaluate on; default: ImageSets/Segmentation/val.txt")
    parser.add_argument("--masks", default="SegmentationClass", help="folder of the masks of labeled ids")
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


def listed(root: Path, names: Path, folder: str, *, masks: bool = True) -> ListedFiles:
    """The images of a list; the masks of a list of ids are in a folder."""
    pairs = read_pairs(names)
    for index, pair in enumerate(pairs):
        if pair.mask is None:
            id = Path(pair.image).name.removesuffix(".jpg")
            pairs[index] = pair._replace(image=f"JPEGImages/{id}.jpg", mask=f"{folder}/{id}.png")
    return ListedFiles(root, pairs, masks=masks)


def main() -> None:
    """Train, evaluate every stage at full resolution and one scale, write everything to the work directory."""
    args = parse()
    everything = listed(args.data, args.labeled, args.masks)
    labeled: Dataset[Any] = everything
    unlabeled: Dataset[Any] | None = None
    if args.unlabeled:
        unlabeled = listed(args.data, args.unlabeled, args.masks, masks=False)
    val = listed(args.data, args.val or args.data / "ImageSets/Segmentation/val.txt", "SegmentationClass")
    config = stseg.TrainConfig.pascal(
        head_lr_factor=1 if args.network == "DeepLabV2" else 10,
        precision="bf16" if args.bf16 else "fp32",
        **{name: value for name, value in vars(args).items() if name in SETTINGS},
    )
    if args.fraction:
        drawn = set(split_ids(everything.ids, float(args.fraction), seed=config.seed)[0])
        without_masks = listed(args.data, args.labeled, args.masks, masks=False)
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
