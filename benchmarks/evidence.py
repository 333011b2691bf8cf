"""Does it help? Methods x seeds x fractions on a data set: a table, the numbers as CSV, and plots.

    python benchmarks/evidence.py --data camvid --out runs/evidence --fractions 1/8 --seeds 0 1 2

The data folder holds ``train/images``, ``train/masks``, ``val/images`` and ``val/masks``, paired by name. Which images
count as labelled stands in ``splits/1_8/seed_0/labeled.txt`` and ``unlabeled.txt``; where there is no such file, it is
drawn with the seed. The seed is that of the training, too. For other data, fill a ``Source`` and call ``run``.

All methods begin with the network of "supervised" of the same fraction and seed, and every stage takes as many steps.
Each run has a work directory; what was killed goes on when the same command is given again, and what is done is not
done again. True masks of images that do not count as labelled serve to measure pseudo-labels, never to train.
"""

from __future__ import annotations

import argparse
import json
import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from evidence_tables import Result, write_results
from pages import put
from timing import conditions
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torchvision.transforms.v2 import functional as vision
from tqdm.auto import tqdm

import stseg
from stseg.data import MixedDataset, SegmentationFolder, read_ids, split_ids
from stseg.files import write_atomically
from stseg.records import check_record, read_record
from stseg.samples import ids_of

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
NOTHING: dict[str, Any] = {"jitter_p": 0.0, "gray_p": 0.0, "blur_p": 0.0, "cutout": None}
IGNORED = 255


@dataclass(frozen=True)
class Source:
    """A data set to gather evidence on.

    Args:
        train: all training images with their masks, ``(image, mask)``, with ``ids``.
        val: what every network is evaluated on.
        classes: the name of each class.
        split: ``(fraction, seed) -> (labelled, unlabelled)`` ids of ``train``.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    classes: tuple[str, ...]
    split: Callable[[str, int], tuple[list[str], list[str]]]


class Resized(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks at one size, held in memory once they have been read."""

    def __init__(self, dataset: SegmentationFolder, size: tuple[int, int]) -> None:
        self.dataset, self.size, self.ids = dataset, list(size), dataset.ids
        self._read: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index not in self._read:
            image, mask = self.dataset[index]
            nearest = vision.InterpolationMode.NEAREST
            self._read[index] = (
                vision.resize(image, self.size, antialias=True),
                vision.resize(mask[None], self.size, interpolation=nearest)[0],
            )
        return self._read[index]


class Images(Dataset[Tensor]):
    """The images of a labelled data set without their masks."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset, self.ids = dataset, ids_of(dataset)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Tensor:
        image: Tensor = self.dataset[index][0]
        return image


class AlsoStrong(Dataset[tuple[Tensor, Tensor]]):
    """The labelled images under other names, so that they may stand where the pseudo-labelled ones do."""

    def __init__(self, dataset: Dataset[Any], ids: Sequence[str]) -> None:
        self.dataset, self.ids = dataset, [f"{id} again" for id in ids]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, mask = self.dataset[index]
        return image, mask


def folder_source(root: Path, *, size: tuple[int, int] | None, classes: Sequence[str]) -> Source:
    """A folder laid out as this file's first lines say."""
    train, val = (SegmentationFolder(root / part / "images", root / part / "masks") for part in ("train", "val"))

    def split(fraction: str, seed: int) -> tuple[list[str], list[str]]:
        lists = root / "splits" / fraction.replace("/", "_") / f"seed_{seed}"
        if lists.is_dir():
            return read_ids(lists / "labeled.txt"), read_ids(lists / "unlabeled.txt")
        return split_ids(train.ids, labelled=share_of(fraction), seed=seed)

    if size is None:
        return Source(train, val, tuple(classes), split)
    return Source(Resized(train, size), Resized(val, size), tuple(classes), split)


def share_of(fraction: str) -> float | int:
    """The share that a text such as "1/8" names, or the number of images that "20" does."""
    above, slash, below = fraction.partition("/")
    return int(above) / int(below) if slash else int(above)


@dataclass(frozen=True)
class Case:
    """What one run works with: the data of a fraction and a seed, and how every network is made and trained."""

    labelled: Dataset[Any]
    unlabelled: Dataset[Any]
    true: Dataset[Any]
    """The unlabelled images with their true masks, for what measures the methods and is none."""
    everything: Dataset[Any]
    val: Dataset[Any]
    num_classes: int
    make_model: Callable[[], nn.Module]
    config: stseg.TrainConfig
    folder: Path

    def trainer(self, name: str, method: str, **options: Any) -> stseg.SelfTrainer:
        """For a run in a folder of its own."""
        config = options.pop("config", self.config)
        return stseg.SelfTrainer(
            self.make_model,
            num_classes=self.num_classes,
            config=config,
            method=method,  # type: ignore[arg-type]
            workdir=self.folder / name,
            **options,
        )


Run = stseg.SelfTrainingResult
Method = Callable[[Case, str], Run]
"""``(case, name of the folder) -> result``."""


def longer(config: stseg.TrainConfig, times: int) -> stseg.TrainConfig:
    """The same settings for so many times the steps."""
    return replace(config, steps=times * (config.steps or 0))


def supervised(case: Case, name: str, *, times: int = 1) -> Run:
    """On the labelled images, perhaps for longer."""
    trainer = case.trainer(name, "supervised", config=longer(case.config, times))
    return trainer.fit(case.labelled, val=case.val)


def ceiling(case: Case, name: str) -> Run:
    """On the masks of all images."""
    return case.trainer(name, "supervised").fit(case.everything, val=case.val)


def self_trained(case: Case, name: str, *, method: str, times: int = 1, rate: float = 1.0, **options: Any) -> Run:
    """ST or ST++ from the supervised network, which is trained now if that has not been done.

    The students train for ``times`` as many steps at ``rate`` times the learning rate.
    """
    teacher = supervised(case, "supervised").stages["teacher"]
    config = longer(replace(case.config, lr=rate * case.config.lr), times)
    trainer = case.trainer(name, method, config=config, **options)
    return trainer.fit(case.labelled, case.unlabelled, case.val, teacher=teacher)


def on_true_masks(case: Case, name: str, *, strong: Dataset[Any]) -> Run:
    """A student's training on true masks; about half the draws are of ``strong``, under the strong augmentation."""
    torch.manual_seed(case.config.seed)
    stage = stseg.fit(
        case.make_model(),
        MixedDataset(case.labelled, strong),
        case.config,
        strong=stseg.StrongAugment(),
        val=case.val,
        workdir=case.folder / name / "teacher",
        title=name,
    )
    return Run(
        model=stage.model,
        stages={"teacher": stage},
        labels={},
        ranking=None,
        skipped=(),
        seconds={"teacher": stage.seconds},
    )


def strongly_augmented(case: Case, name: str) -> Run:
    """What does the strong augmentation do alone? The labelled images take the place of the pseudo-labelled ones."""
    return on_true_masks(case, name, strong=AlsoStrong(case.labelled, case.labelled.ids))  # type: ignore[attr-defined]


def rightly_labelled(case: Case, name: str) -> Run:
    """What do the errors of the pseudo-labels do? ST as if there were none."""
    return on_true_masks(case, name, strong=case.true)


def only(**chosen: Any) -> stseg.StrongAugment:
    """A strong augmentation with nothing but what is chosen."""
    return stseg.StrongAugment(**{**NOTHING, **chosen})


METHODS: dict[str, tuple[str, Method]] = {
    "supervised": ("supervised", supervised),
    "supervised-2x": ("supervised, twice the steps", partial(supervised, times=2)),
    "supervised-strong": ("supervised, strong augmentation too", strongly_augmented),
    "st": ("ST", partial(self_trained, method="st")),
    "st++": ("ST++", partial(self_trained, method="st++")),
    "st-true": ("ST, were all pseudo-labels right", rightly_labelled),
    "st-plain": ("ST without strong augmentation", partial(self_trained, method="st", strong=None)),
    "st-jitter": ("ST, colour jitter alone", partial(self_trained, method="st", strong=only(jitter_p=0.8))),
    "st-gray": ("ST, grey alone", partial(self_trained, method="st", strong=only(gray_p=0.2))),
    "st-blur": ("ST, blur alone", partial(self_trained, method="st", strong=only(blur_p=0.5))),
    "st-cutout": ("ST, cutout alone", partial(self_trained, method="st", strong=only(cutout=stseg.Cutout()))),
    "st-2x": ("ST, student twice the steps", partial(self_trained, method="st", times=2)),
    "st-warm": ("ST, student begins as its teacher", partial(self_trained, method="st", student_init="teacher")),
    "st-balanced": ("ST, surest 80 % of each class", partial(self_trained, method="st", keep_per_class=0.8)),
    "st-both": ("ST, both: `FROM_SCRATCH`", partial(self_trained, method="st", **stseg.FROM_SCRATCH)),
    "st++-both": ("ST++, both: `FROM_SCRATCH`", partial(self_trained, method="st++", **stseg.FROM_SCRATCH)),
    "st-gentle": (
        "ST, `FROM_SCRATCH`, a quarter of the learning rate",
        partial(self_trained, method="st", rate=0.25, **stseg.FROM_SCRATCH),
    ),
    "ceiling": ("supervised, all masks", ceiling),
}
"""What can be asked for: by name, how tables call it and how it is run."""


def run(
    source: Source,
    *,
    fractions: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
    make_model: Callable[[], nn.Module],
    config: stseg.TrainConfig,
    out: Path,
) -> list[Result]:
    """Everything that is asked for and has not been done; tables and plots are written anew after each.

    Returns:
        The results of all runs in ``out``.
    """
    jobs = [(method, fraction, seed) for fraction in fractions for seed in seeds for method in methods]
    jobs = [job for job in jobs if not result_file(out, *job).exists()]
    for job in tqdm(jobs, desc="runs", dynamic_ncols=True):
        run_one(source, job, make_model=make_model, config=config, out=out)
        write_all(out, source.classes)
    return write_all(out, source.classes)


def write_all(out: Path, classes: Sequence[str]) -> list[Result]:
    """``results.csv``, ``results.md`` and the plots, of all runs that are done, now or earlier."""
    found = [Result(**(read_record(path) or {})) for path in out.glob("*/seed_*/*/result.json")]
    order = list(METHODS)
    found.sort(key=lambda r: (-share_of(r.fraction), order.index(r.method), r.seed))
    write_results(found, classes, {name: title for name, (title, _) in METHODS.items()}, out)
    return found


def result_file(out: Path, method: str, fraction: str, seed: int) -> Path:
    """Where a run leaves its result when it is done."""
    return place(out, fraction, seed) / method / "result.json"


def place(out: Path, fraction: str, seed: int) -> Path:
    """Where the runs of a fraction and a seed are."""
    return out / fraction.replace("/", "_") / f"seed_{seed}"


def run_one(
    source: Source,
    job: tuple[str, str, int],
    *,
    make_model: Callable[[], nn.Module],
    config: stseg.TrainConfig,
    out: Path,
) -> None:
    """One method with one fraction and one seed."""
    method, fraction, seed = job
    case = case_of(source, fraction, seed, make_model=make_model, config=config, out=out)
    outcome = METHODS[method][1](case, method)
    metric = stseg.evaluate(outcome.model, case.val, num_classes=case.num_classes, progress=False)
    result = Result(
        method=method,
        fraction=fraction,
        seed=seed,
        miou=metric.compute(),
        iou=metric.iou().tolist(),
        labelled=len(case.labelled),  # type: ignore[arg-type]
        unlabelled=len(case.unlabelled),  # type: ignore[arg-type]
        pseudo=pseudo_quality(outcome, source, case),
        seconds=sum(outcome.seconds.values()),
        conditions=conditions(),
    )
    content = json.dumps(vars(result), indent=1).encode()
    write_atomically(result_file(out, *job), lambda file: file.write(content))


def case_of(
    source: Source,
    fraction: str,
    seed: int,
    *,
    make_model: Callable[[], nn.Module],
    config: stseg.TrainConfig,
    out: Path,
) -> Case:
    """The data and settings of a fraction and a seed."""
    labelled, unlabelled = source.split(fraction, seed)
    where = {id: index for index, id in enumerate(source.train.ids)}  # type: ignore[attr-defined]
    few, many = (Subset(source.train, [where[id] for id in ids]) for ids in (labelled, unlabelled))
    few.ids = labelled  # type: ignore[attr-defined]
    return Case(
        labelled=few,
        unlabelled=Images(many),
        true=many,
        everything=source.train,
        val=source.val,
        num_classes=len(source.classes),
        make_model=make_model,
        config=config.with_seed(seed),
        folder=place(out, fraction, seed),
    )


def pseudo_quality(outcome: Run, source: Source, case: Case) -> dict[str, float]:
    """MIoU of the pseudo-labels of each step, pixels left out apart, with the true masks, which nothing else sees."""
    where = {id: index for index, id in enumerate(source.train.ids)}  # type: ignore[attr-defined]
    found = {}
    for step, labels in outcome.labels.items():
        metric = stseg.MeanIoU(case.num_classes)
        for id in labels.ids:
            label, true = labels.store.get(id), source.train[where[id]][1]
            metric.update(label, true.masked_fill(label == IGNORED, IGNORED))
        found[step] = metric.compute()
    return found


def network_of(arguments: argparse.Namespace) -> nn.Module:
    """A network of segmentation_models_pytorch, or one of the paper's, with fresh weights."""
    options = json.loads(arguments.network_options)
    classes = len(arguments.classes)
    name, pretrained = arguments.arch.removeprefix("stseg."), arguments.weights is not None
    if name != arguments.arch:
        architecture = getattr(stseg.models, name)
        network = architecture(arguments.encoder, num_classes=classes, pretrained=pretrained, **options)
    else:
        architecture = getattr(smp, name)
        network = architecture(arguments.encoder, encoder_weights=arguments.weights, classes=classes, **options)
    made: nn.Module = network.to(memory_format=torch.channels_last)
    return made


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Data, what to run, and how every stage is trained."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fractions", nargs="+", default=["1/8"], help="such as 1/8 1/4")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["supervised", "st", "st++"])
    parser.add_argument("--classes", nargs="+", default=list(CAMVID), help="their names; CamVid's by default")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="resize everything to this first")
    parser.add_argument(
        "--arch", default="Unet", help="of segmentation_models_pytorch, or the paper's: stseg.DeepLabV3Plus"
    )
    parser.add_argument("--encoder", default="resnet18", help="its encoder or backbone")
    parser.add_argument("--weights", default=None, help="'imagenet' for a pretrained encoder")
    parser.add_argument("--network-options", default="{}", help="further arguments of the network, as JSON")
    parser.add_argument("--steps", type=int, default=6000, help="of every stage")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs=2, default=(96, 128), metavar=("H", "W"))
    parser.add_argument("--scale", type=float, nargs=2, default=(0.75, 2.0), help="of the weak augmentation")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW; pretrained encoders learn at a tenth")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 autocast")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--page", type=Path, help="Markdown page to put the tables into, between its evidence marks")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for; print the table."""
    args = parse(arguments)
    source = folder_source(args.data, size=None if args.size is None else tuple(args.size), classes=args.classes)
    pretrained = args.weights is not None
    config = stseg.TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        crop_size=tuple(args.crop),
        base_size=max(source.val[0][0].shape[-2:]),
        scale=tuple(args.scale),
        optimizer="adamw",
        lr=args.lr / 10 if pretrained else args.lr,
        head_lr_factor=10 if pretrained else 1,
        weight_decay=0.01,
        precision="fp32" if args.fp32 else "bf16",
        num_workers=args.workers,
    )
    not_settings = ("data", "out", "fractions", "seeds", "methods", "workers", "page")
    settings = {name: value for name, value in vars(args).items() if name not in not_settings}
    ids = [*ids_of(source.train), *ids_of(source.val)]
    check_record(
        args.out / "evidence.json", {**settings, "images": f"{len(ids)}, {zlib.crc32(repr(ids).encode()):08x}"}
    )
    results = run(
        source,
        fractions=[fraction.replace("_", "/") for fraction in args.fractions],
        seeds=args.seeds,
        methods=args.methods,
        make_model=partial(network_of, args),
        config=config,
        out=args.out,
    )
    print((args.out / "results.md").read_text())
    if args.page is not None:
        put(args.page, "evidence", (args.out / "results.md").read_text())
    print(f"{len(results)} runs, median {statistics.median(r.seconds for r in results):.0f} s: {args.out}")


if __name__ == "__main__":
    main()
