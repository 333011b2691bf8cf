"""Compare methods over seeds and fractions on a data set: a table, CSV, and plots.

    python benchmarks/evidence.py --data camvid --out runs/camvid --fractions 1/8 --seeds 0 1 2
    python benchmarks/evidence.py --data nuclei --out runs/nuclei --fractions 1/96 --classes background nucleus \
        --class-map 0:0 255:1

The data folder holds ``train/images``, ``train/masks``, ``val/images`` and ``val/masks``, paired by name. The
labeled images are listed in ``splits/1_8/seed_0/labeled.txt`` and ``unlabeled.txt``; without these files, they are
drawn with the seed, as many as in the lists of other seeds. The seed is also that of the training. For other data,
create a ``Source`` and call ``run``.

ST and ST++ start from the "supervised" network of the same fraction and seed, and every stage has the same number of
steps. Each run has a work directory; killed runs resume when the same command is given again, and finished ones are
skipped. Several processes with the same command share the runs. True masks of unlabeled images are used to measure
pseudo-labels; only the references "ceiling" and "st-true" train on them.

The network of a run is in its last stage: ``OUT/1_8/seed_0/st++/student-2/model.safetensors``, ``st/student``,
``supervised/teacher``. These are the weights of the bare network. ``stseg.evaluate`` evaluates it on images and masks
resized to ``--size``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import zlib
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from evidence_data import CAMVID, ImagesOnly, Selected, Source, folder_source, share_of
from evidence_methods import FROM_SUPERVISED, METHODS, Case, MakeModel, Run
from evidence_tables import Result, read_results, write_results
from files import claim, read_json, taken, write, write_json
from pages import between, put
from precision import keep_depthwise_in_float32
from timing import conditions
from torch import nn
from tqdm.auto import tqdm

import stseg

IGNORED = 255
SETTINGS, RESULTS = "evidence.json", "results.csv"
SECONDS_BETWEEN_TRIES = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(
    source: Source,
    *,
    fractions: Sequence[str],
    seeds: Sequence[int],
    methods: Sequence[str],
    make_model: MakeModel,
    config: stseg.TrainConfig,
    out: Path,
    known: Sequence[Result] = (),
    save: Path | None = None,
) -> list[Result]:
    """Run everything that is not finished; tables and plots are updated after each run.

    Runs that another process is doing are left to it, and waited for.

    Args:
        source: the data.
        fractions: shares of labeled images, such as ``"1/8"``.
        seeds: seeds of the draws and of the training.
        methods: names of ``METHODS``.
        make_model: makes a network with initial weights.
        config: settings of every stage.
        out: folder for this network, these settings and these data only.
        known: results of runs that are not done again.
        save: folder that gets the list of all results, after each run.

    Returns:
        The results of all runs in ``out``, and the known ones.

    Raises:
        WorkdirMismatchError: if runs in ``out`` used other labeled images.
    """
    for fraction, seed in product(fractions, seeds):
        drawn = [f"{len(ids)}, {zlib.crc32(repr(ids).encode()):08x}" for ids in source.split(fraction, seed)]
        check_settings(place(out, fraction, seed) / "split.json", {"labeled": drawn[0], "unlabeled": drawn[1]})
    finished = {(r.method, r.fraction, r.seed) for r in known}
    jobs = [(method, fraction, seed) for fraction, seed, method in product(fractions, seeds, methods)]
    jobs = [job for job in jobs if job not in finished]
    # Processes that share the list would wait for the supervised network of the next run.
    jobs = [("supervised", *job[1:]) for job in jobs if job[0] in FROM_SUPERVISED] + jobs
    jobs = [job for job in dict.fromkeys(jobs) if not result_file(out, *job).exists()]
    with tqdm(total=len(jobs), desc="runs", dynamic_ncols=True) as bar:
        while jobs:
            before = len(jobs)
            for job in list(jobs):
                if try_one(source, job, make_model=make_model, config=config, out=out):
                    jobs.remove(job)
                    bar.update()
                    write_all(out, source.classes, known, save, plots=False)
            if len(jobs) == before:
                time.sleep(SECONDS_BETWEEN_TRIES)
    return write_all(out, source.classes, known, save, plots=True)


def try_one(
    source: Source,
    job: tuple[str, str, int],
    *,
    make_model: MakeModel,
    config: stseg.TrainConfig,
    out: Path,
) -> bool:
    """Run a job unless another process is doing it or its supervised network; return whether it is finished."""
    method, fraction, seed = job
    needed = result_file(out, "supervised", fraction, seed)
    if method in FROM_SUPERVISED and not needed.exists():
        return False
    with taken(place(out, fraction, seed) / f".{method}.lock") as free:
        if free and not result_file(out, *job).exists():
            run_one(source, job, make_model=make_model, config=config, out=out)
    return result_file(out, *job).exists()


def check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Check that the settings are those of the runs in the folder; ignored if no run was started."""
    if not any(path.parent.rglob("stage.json")):
        path.unlink(missing_ok=True)
    claim(path, settings)


def write_all(
    out: Path, classes: Sequence[str], known: Sequence[Result], save: Path | None, *, plots: bool
) -> list[Result]:
    """Write ``results.csv`` and ``results.md`` of all finished runs, and draw the plots if they are wanted."""
    own = [Result(**(read_json(path) or {})) for path in out.glob("*/seed_*/*/result.json")]
    done = {(r.method, r.fraction, r.seed) for r in own}
    found = own + [r for r in known if (r.method, r.fraction, r.seed) not in done]
    order = list(METHODS)
    found.sort(key=lambda r: (-share_of(r.fraction), order.index(r.method), r.seed))
    write_results(found, classes, {name: title for name, (title, _) in METHODS.items()}, out, plots=plots)
    if save is not None:
        write(save / RESULTS, (out / RESULTS).read_bytes())
    return found


def result_file(out: Path, method: str, fraction: str, seed: int) -> Path:
    """Return the path of the result of a run."""
    return place(out, fraction, seed) / method / "result.json"


def place(out: Path, fraction: str, seed: int) -> Path:
    """Return the folder of the runs of a fraction and a seed."""
    return out / fraction.replace("/", "_") / f"seed_{seed}"


def run_one(
    source: Source,
    job: tuple[str, str, int],
    *,
    make_model: MakeModel,
    config: stseg.TrainConfig,
    out: Path,
) -> None:
    """Run one method with one fraction and one seed."""
    method, fraction, seed = job
    case = case_of(source, fraction, seed, make_model=make_model, config=config, out=out)
    at_once, began = not (case.folder / method).exists(), time.process_time()
    outcome = METHODS[method][1](case, method)
    cpu_seconds = time.process_time() - began
    metric = stseg.evaluate(
        outcome.model, case.val, num_classes=case.num_classes, precision="fp32", device=DEVICE, progress=False
    )
    result = Result(
        method=method,
        fraction=fraction,
        seed=seed,
        miou=metric.compute(),
        iou=metric.iou().tolist(),
        labeled=len(case.labeled),  # type: ignore[arg-type]
        unlabeled=len(case.unlabeled),  # type: ignore[arg-type]
        pseudo=pseudo_quality(outcome, source, case),
        seconds=sum(outcome.seconds.values()),
        cpu_seconds=cpu_seconds if at_once else None,
        conditions=f"{conditions()}, {config.on(torch.device(DEVICE)).precision}",
    )
    write_json(result_file(out, *job), vars(result))


def case_of(
    source: Source,
    fraction: str,
    seed: int,
    *,
    make_model: MakeModel,
    config: stseg.TrainConfig,
    out: Path,
) -> Case:
    """Return the data and settings of a fraction and a seed."""
    labeled, unlabeled = source.split(fraction, seed)
    few, many = Selected(source.train, labeled), Selected(source.train, unlabeled)
    return Case(
        labeled=few,
        unlabeled=ImagesOnly(many),
        true=many,
        everything=source.train,
        val=source.val,
        num_classes=len(source.classes),
        make_model=make_model,
        config=config.with_seed(seed),
        folder=place(out, fraction, seed),
    )


def pseudo_quality(outcome: Run, source: Source, case: Case) -> dict[str, float]:
    """Compute the mIoU of the pseudo-labels of each step with the true masks, without ignored pixels."""
    where = {id: index for index, id in enumerate(source.train.ids)}
    found = {}
    for step, labels in outcome.labels.items():
        metric = stseg.MeanIoU(case.num_classes)
        for id in labels.ids:
            label, true = labels.store.get(id), source.train[where[id]][1]
            metric.update(label, true.masked_fill(label == IGNORED, IGNORED))
        found[step] = metric.compute()
    return found


def network_of(arguments: argparse.Namespace, in_channels: int = 3, classes: int | None = None) -> nn.Module:
    """Make a network of segmentation_models_pytorch, or one of the paper, with new or pretrained weights.

    Args:
        arguments: the command line.
        in_channels: 3, or others for a network of smp with random weights.
        classes: how many; None for those of the data.
    """
    options = json.loads(arguments.network_options)
    classes = classes or len(arguments.classes)
    name, pretrained = arguments.arch.removeprefix("stseg."), arguments.weights is not None
    if not hasattr(smp if name == arguments.arch else stseg.models, name):
        raise ValueError(
            f"--arch is {arguments.arch!r}; expected a network of segmentation_models_pytorch, such as Unet, or one of "
            "the paper's: stseg.DeepLabV3Plus, stseg.PSPNet, stseg.DeepLabV2"
        )
    if name != arguments.arch:
        architecture = getattr(stseg.models, name)
        network = architecture(arguments.encoder, num_classes=classes, pretrained=pretrained, **options)
    else:
        wrapped = stseg.models.create_network(
            name,
            arguments.encoder,
            num_classes=classes,
            weights=arguments.weights if in_channels == 3 else None,
            channels=in_channels,
            options=options,
        )
        normal = (stseg.IMAGENET_MEAN, stseg.IMAGENET_STD)
        network = wrapped.network if (wrapped.mean, wrapped.std) == normal else wrapped
    if DEVICE == "cpu":
        keep_depthwise_in_float32(network)
    made: nn.Module = network.to(memory_format=torch.channels_last)
    return made


def source_of(root: Path, arguments: argparse.Namespace) -> Source:
    """Return the source of a folder that the command line describes."""
    return folder_source(
        root,
        size=None if arguments.size is None else tuple(arguments.size),
        classes=arguments.classes,
        class_map=None if arguments.class_map is None else dict(arguments.class_map),
    )


def value_and_class(text: str) -> tuple[int, int]:
    """Parse ``VALUE:CLASS``."""
    value, of = text.split(":")
    return int(value), int(of)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--fractions", nargs="+", default=["1/8"], help="such as 1/8 1/4 0.02, or numbers of images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=["supervised", "st", "st++"])
    parser.add_argument("--classes", nargs="+", default=list(CAMVID), help="their names; CamVid's by default")
    parser.add_argument(
        "--class-map",
        type=value_and_class,
        nargs="+",
        metavar="VALUE:CLASS",
        help="the class of each value of the masks, such as 0:0 255:1; by default the values are the classes",
    )
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="resize everything to this first")
    parser.add_argument(
        "--arch", default="Unet", help="of segmentation_models_pytorch, or the paper's: stseg.DeepLabV3Plus"
    )
    parser.add_argument("--encoder", default="resnet18", help="its encoder or backbone")
    parser.add_argument(
        "--weights",
        default=None,
        help="'imagenet' for a pretrained encoder, or another name that smp has; 'installed' for the encoder "
        "tu-tf_efficientnet_lite0 with the weights of the extra stseg[weights]; for the paper's networks it is timm's "
        "choice, or the one that --encoder names, as in resnet50.tv_in1k",
    )
    parser.add_argument("--network-options", default="{}", help="further arguments of the network, as JSON")
    parser.add_argument("--steps", type=int, default=6000, help="of every stage")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs=2, default=(96, 128), metavar=("H", "W"))
    parser.add_argument("--scale", type=float, nargs=2, default=(0.75, 2.0), help="of the weak augmentation")
    parser.add_argument("--vertical-flip", action="store_true", help="in the weak augmentation, and quarter turns")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW")
    parser.add_argument(
        "--encoder-lr-factor", type=float, default=0.1, help="of pretrained encoders, as a multiple of --lr"
    )
    parser.add_argument("--evaluations", type=int, default=20, help="on val, during each stage")
    parser.add_argument("--fp32", action="store_true", help="no bfloat16 autocast, even where the device has bfloat16")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--known",
        type=Path,
        metavar="FOLDER",
        help="results of earlier runs with the same settings, as --save keeps them: not done again",
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="folder to keep the settings and all results in")
    parser.add_argument("--page", type=Path, help="Markdown page to put the tables into, between its evidence marks")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiments and print the table."""
    args = parse(arguments)
    source = source_of(args.data, args)
    factor = 1.0 if args.weights is None else args.encoder_lr_factor
    sizes = {max(image.shape[-2:]) for image, _ in (source.train[index] for index in range(len(source.train)))}
    config = stseg.TrainConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        weak=stseg.WeakAugment(
            tuple(args.crop),
            base_size=sizes.pop() if len(sizes) == 1 else None,
            scale=tuple(args.scale),
            vertical_flip=0.5 if args.vertical_flip else 0.0,
            quarter_turns=args.vertical_flip,
        ),
        optimizer="adamw",
        lr=args.lr * factor,
        head_lr_factor=1 / factor,
        eval_every=max(1, args.steps // args.evaluations),
        weight_decay=0.01,
        precision="fp32" if args.fp32 else "auto",
        num_workers=args.workers,
    )
    not_settings = ("data", "out", "fractions", "seeds", "methods", "workers", "evaluations", "known", "save", "page")
    settings = {name: value for name, value in vars(args).items() if name not in not_settings}
    fractions = [fraction.replace("_", "/") for fraction in args.fractions]
    if args.page is not None:
        between(args.page, "evidence")
    ids = [*source.train.ids, *source.val.ids]
    settings |= {"images": f"{len(ids)}, {zlib.crc32(repr(ids).encode()):08x}"}
    check_settings(args.out / SETTINGS, settings)
    known = []
    if args.known is not None:
        known = read_results(args.known / RESULTS, source.classes)
        claim(args.known / SETTINGS, settings)
    if args.save is not None:
        claim(args.save / SETTINGS, settings)
    results = run(
        source,
        fractions=fractions,
        seeds=args.seeds,
        methods=args.methods,
        make_model=partial(network_of, args),
        config=config,
        out=args.out,
        known=known,
        save=args.save,
    )
    print((args.out / "results.md").read_text())
    if args.page is not None:
        put(args.page, "evidence", (args.out / "results.md").read_text())
    print(f"{len(results)} runs, median {statistics.median(r.seconds for r in results):.0f} s: {args.out}")


if __name__ == "__main__":
    main()
