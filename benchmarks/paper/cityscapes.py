r"""The experiments of ST++ on Cityscapes (Yang et al., CVPR 2022, section 4): supervised, ST or ST++.

    python benchmarks/paper/cityscapes.py --data cityscapes --pretrained --out runs/cityscapes \
        --labeled 1_8/labeled.txt --unlabeled 1_8/unlabeled.txt

The data folder holds ``leftImg8bit`` and ``gtFine``. A list has on each line an image and its mask,
``leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png``, or an id, ``aachen_000000_000019``. Masks of
unlabeled images need not exist. ``torchrun --nproc-per-node 4`` in place of ``python`` shares the work between four
GPUs. A run that was killed resumes when the same command is given again.
"""

from pathlib import Path

from runner import paper_parser, run_paper

import stseg
from stseg.data import FilePair, ListedFiles, read_pairs

# By the value in `labelIds` masks, in the order of the classes that are evaluated; all others are ignored.
LABELS = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"}
LABELS |= {20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"}
LABELS |= {27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
CLASSES = tuple(LABELS.values())


def files_of(line: FilePair, part: str, masks_of: str) -> FilePair:
    """Return the files that a line names, or those of its id, which may have folders before it: ``train/aachen/``."""
    if line.mask is not None:
        return line
    *folders, name = line.image.removesuffix(".png").removesuffix("_leftImg8bit").split("/")
    city = folders[-1] if folders else name.split("_")[0]
    folder = f"{folders[-2] if len(folders) > 1 else part}/{city}/{name}"
    return line._replace(image=f"leftImg8bit/{folder}_leftImg8bit.png", mask=f"gtFine/{folder}_gtFine_{masks_of}.png")


def listed(root: Path, names: Path | None, part: str, masks_of: str, *, masks: bool = True) -> ListedFiles:
    """Make a data set of a list, or of all images of a part; ``labelIds`` are mapped to the classes."""
    found = (FilePair(path.stem) for path in sorted((root / "leftImg8bit" / part).glob("*/*_leftImg8bit.png")))
    pairs = [files_of(line, part, masks_of) for line in (found if names is None else read_pairs(names))]
    raw = {str(pair.mask).endswith("_labelIds.png") for pair in pairs} if masks else {False}
    if len(raw) > 1:
        raise SystemExit(f"{names} names labelIds and other masks; expected one kind of them")
    class_map = {value: index for index, value in enumerate(LABELS)} if raw == {True} else None
    return ListedFiles(root, pairs, masks=masks, class_map=class_map)


def main() -> None:
    """Train, evaluate, print. Two images of 2 megapixels at once, which labeling sees at twice the size too."""
    parser = paper_parser(__doc__)
    parser.add_argument("--masks", choices=("labelIds", "labelTrainIds"), default="labelIds", help="those of ids")
    run_paper(parser.parse_args(), listed, classes=CLASSES, config=stseg.TrainConfig.cityscapes, eval_batch_size=2)


if __name__ == "__main__":
    main()
