r"""The experiments of ST++ on Pascal VOC 2012 (Yang et al., CVPR 2022, section 4): supervised, ST or ST++.

    python benchmarks/paper/pascal_voc.py --data VOCdevkit/VOC2012 --pretrained --out runs/pascal \
        --labeled 1_8/labeled.txt --unlabeled 1_8/unlabeled.txt

The data folder holds ``JPEGImages`` and ``SegmentationClass``. A list has on each line an image and its mask,
``JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png``, or an id, ``2007_000032``. Masks of unlabeled images
need not exist. ``torchrun --nproc-per-node 4`` in place of ``python`` shares the work between four GPUs. A run that was
killed resumes when the same command is given again.
"""

from pathlib import Path

from runner import paper_parser, run_paper

import stseg
from stseg.data import ListedFiles, read_pairs

CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
)


def listed(root: Path, names: Path | None, part: str, masks_of: str, *, masks: bool = True) -> ListedFiles:
    """Make a data set of a list; the masks of ids are in the folder ``masks_of``, and for validation in the usual."""
    folder = masks_of if part == "train" else "SegmentationClass"
    pairs = read_pairs(names or root / "ImageSets/Segmentation/val.txt")
    for index, pair in enumerate(pairs):
        if pair.mask is None:
            id = Path(pair.image).name.removesuffix(".jpg")
            pairs[index] = pair._replace(image=f"JPEGImages/{id}.jpg", mask=f"{folder}/{id}.png")
    return ListedFiles(root, pairs, masks=masks)


def main() -> None:
    """Train, evaluate, print."""
    parser = paper_parser(__doc__)
    parser.add_argument("--masks", default="SegmentationClass", help="folder of the masks of labeled ids")
    run_paper(parser.parse_args(), listed, classes=CLASSES, config=stseg.TrainConfig.pascal)


if __name__ == "__main__":
    main()
