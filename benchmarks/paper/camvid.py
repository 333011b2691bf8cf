"""ST++ on CamVid, or on any folder laid out like it.

    python benchmarks/paper/camvid.py --data camvid --split 1_8/seed_0 --out runs/camvid

The data folder holds ``train/images``, ``train/masks``, ``val/images``, ``val/masks`` and
``splits/<split>/labeled.txt`` and ``unlabeled.txt``. A run that was killed resumes when the same command is given
again.
"""

import segmentation_models_pytorch as smp
from runner import parser_of, run, settings_of
from torch import nn

import stseg
from stseg.data import SegmentationFolder, read_ids

CLASSES = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")


def main() -> None:
    """Train, evaluate, print."""
    parser = parser_of(__doc__)
    parser.add_argument("--split", default="1_8/seed_0")
    parser.add_argument("--arch", default="Unet", help="an architecture of segmentation_models_pytorch")
    parser.add_argument("--encoder", default="resnet18", help="one of its encoders")
    parser.add_argument("--weights", default=None, help="'imagenet' for a pretrained encoder")
    parser.add_argument("--height", type=int, default=120, help="of the crops; their width is 4/3 of it")
    args = parser.parse_args()

    def folder(part: str, *, masks: bool, ids: str | None = None) -> SegmentationFolder:
        chosen = None if ids is None else read_ids(args.data / "splits" / args.split / ids)
        root = args.data / part
        return SegmentationFolder(root / "images", root / "masks" if masks else None, ids=chosen)

    def make_network() -> nn.Module:
        architecture = getattr(smp, args.arch)
        return architecture(args.encoder, encoder_weights=args.weights, classes=len(CLASSES))

    from_scratch = args.weights is None
    width = args.height * 4 // 3
    settings = {"batch_size": 8, **settings_of(args)}
    if "epochs" not in settings:
        settings = {"steps": 6000, **settings}
    config = stseg.TrainConfig(
        weak=stseg.WeakAugment((args.height, width), base_size=width * 5 // 4),
        optimizer="adamw",
        lr=1e-3 if from_scratch else 1e-4,
        head_lr_factor=1 if from_scratch else 10,
        weight_decay=0.01,
        **settings,
    )
    labeled = folder("train", masks=True, ids="labeled.txt")
    unlabeled = folder("train", masks=False, ids="unlabeled.txt")
    run(args, make_network, (labeled, unlabeled, folder("val", masks=True)), classes=CLASSES, config=config)


if __name__ == "__main__":
    main()
