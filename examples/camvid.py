"""ST++ on CamVid, or on any folder laid out like it.

    python examples/camvid.py --data camvid --split 1_8/seed_0 --out runs/camvid

The data folder holds ``train/images``, ``train/masks``, ``val/images``, ``val/masks`` and
``splits/<split>/labeled.txt`` and ``unlabeled.txt``. A run that was killed goes on when started again.
"""

import argparse
from pathlib import Path

import segmentation_models_pytorch as smp
from torch import nn

import stseg
from stseg.data import SegmentationFolder, read_ids

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


def parse() -> argparse.Namespace:
    """The few things that are worth trying."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="work directory: masks, ranking, history, figures")
    parser.add_argument("--split", default="1_8/seed_0")
    parser.add_argument("--method", choices=("supervised", "st", "st++"), default="st++")
    parser.add_argument("--arch", default="Unet", help="an architecture of segmentation_models_pytorch")
    parser.add_argument("--encoder", default="resnet18", help="one of its encoders")
    parser.add_argument("--weights", default=None, help="'imagenet' for a pretrained encoder")
    parser.add_argument("--steps", type=int, default=6000, help="of every stage")
    parser.add_argument("--height", type=int, default=120, help="of the crops; their width is 4/3 of it")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: faster where the hardware has it")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, evaluate on ``val``, write everything to the work directory."""
    args = parse()

    def folder(part: str, *, masks: bool, ids: str | None = None) -> SegmentationFolder:
        chosen = None if ids is None else read_ids(args.data / "splits" / args.split / ids)
        root = args.data / part
        return SegmentationFolder(root / "images", root / "masks" if masks else None, ids=chosen)

    def make_network() -> nn.Module:
        architecture = getattr(smp, args.arch)
        return architecture(args.encoder, encoder_weights=args.weights, classes=len(CLASSES))

    from_scratch = args.weights is None
    width = args.height * 4 // 3
    config = stseg.TrainConfig(
        steps=args.steps,
        batch_size=8,
        crop_size=(args.height, width),
        base_size=width * 5 // 4,
        optimizer="adamw",
        lr=1e-3 if from_scratch else 1e-4,
        head_lr_factor=1 if from_scratch else 10,
        weight_decay=0.01,
        precision="bf16" if args.bf16 else "fp32",
        num_workers=args.workers,
        seed=args.seed,
    )
    trainer = stseg.SelfTrainer(
        make_network, num_classes=len(CLASSES), config=config, method=args.method, workdir=args.out
    )
    val = folder("val", masks=True)
    result = trainer.fit(
        folder("train", masks=True, ids="labeled.txt"), folder("train", masks=False, ids="unlabeled.txt"), val
    )
    stseg.write_report(result, args.out, class_names=CLASSES)
    for name, stage in result.stages.items():
        print(f"{name}: mIoU {100 * stage.history[-1]['miou']:.1f}")
    metric = stseg.evaluate(result.model, val, num_classes=len(CLASSES), precision=config.precision)
    print(", ".join(f"{c} {100 * iou:.1f}" for c, iou in zip(CLASSES, metric.iou().tolist(), strict=True)))
    print(f"masks, ranking, history and report: {args.out}")


if __name__ == "__main__":
    main()
