"""Compare rankings by how well they find bad pseudo-labels: stability and its alternatives.

    python benchmarks/ranking.py --data camvid --runs runs/evidence

The teachers are the supervised networks of ``evidence.py`` in ``--runs``. Each labels and ranks its unlabeled images,
whose true masks are used for measurements only. All scores are computed from the same masks and probabilities: an image
passes once through each checkpoint, and once through the ten views that label it. ``ranking.csv`` and ``ranking.md``
are written to ``--runs``. For other networks and data, call ``measure``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from evidence import network_of, source_of
from evidence_data import Selected, share_of
from files import read_json
from pages import between, put
from scipy.stats import spearmanr
from timing import conditions, device
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

import stseg
from stseg import functional
from stseg.models import as_segmenter

MaskScore = Callable[[Tensor, Tensor, int], Tensor]
LogitScore = Callable[[Tensor], Tensor]

PAPER = "stability (the paper)"
OF_CHECKPOINTS: dict[str, MaskScore] = {
    PAPER: functional.stability,
    "stability without specks below 0.1 %": partial(functional.weighted_stability, power=0, min_share=0.001),
    "stability without specks below 1 %": partial(functional.weighted_stability, power=0, min_share=0.01),
    "stability weighted by area ** 0.25": functional.weighted_stability,
    "stability weighted by area ** 0.5": partial(functional.weighted_stability, power=0.5),
    "stability weighted by area": partial(functional.weighted_stability, power=1),
    "pixel agreement": functional.pixel_agreement,
}
"""From the masks of the checkpoints at one scale."""
OF_VIEWS: dict[str, MaskScore] = {
    "stability, one scale against the views": functional.stability,
    "the same, weighted by area ** 0.25": functional.weighted_stability,
    "the same, weighted by area ** 0.5": partial(functional.weighted_stability, power=0.5),
}
"""From the mask of the last checkpoint at one scale and that of the views: needs no earlier checkpoints."""
OF_LOGITS: dict[str, LogitScore] = {
    "mean confidence": functional.mean_confidence,
    "mean margin": functional.mean_margin,
    "mean certainty (entropy)": functional.mean_certainty,
    "expected IoU": functional.expected_iou,
    "expected IoU weighted by area ** 0.25": partial(functional.expected_iou, power=0.25),
    "expected IoU weighted by area ** 0.5": partial(functional.expected_iou, power=0.5),
}
"""Twice: of the last checkpoint at one scale, and of the views."""
FIGURES = ("spearman", "reliable", "unreliable", "all")
DRAWS = 200


def measure(
    teacher: nn.Module,
    snapshots: Sequence[nn.Module],
    dataset: Any,
    *,
    num_classes: int,
    ignore_index: int = 255,
    tta: Callable[[nn.Module], nn.Module] | None = stseg.MultiScaleFlip,
    fraction: float = 0.5,
    batch_size: int = 8,
    num_workers: int = 0,
    precision: Literal["auto", "fp32", "bf16"] = "fp32",
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Compare rankings with the truth.

    Args:
        teacher: labels the images.
        snapshots: two or more checkpoints of its training, in order.
        dataset: items ``(image, mask)`` of tensors, with ``ids``: the unlabeled images with their true masks.
        num_classes: number of classes.
        ignore_index: mask value of ignored pixels.
        tta: wraps the teacher for labeling; None labels at one scale.
        fraction: share of images that count as reliable.
        batch_size: how many images of equal size at once.
        num_workers: processes that read the data.
        precision: see :class:`stseg.TrainConfig`.
        progress: whether to show a bar.

    Returns:
        For each ranking ``spearman``, the rank correlation of its score with the mIoU of each image's pseudo-label
        (over the classes that are in it or in the true mask), and ``reliable``, ``unreliable`` and ``all``, the mIoU of
        the pseudo-labels of the parts and of all images, each from one confusion matrix. ``"oracle"`` ranks by the true
        mIoU, ``"random"`` is the mean of many random orders. Images without a true pixel are left out.

    Raises:
        ValueError: if there are fewer than two snapshots.
        DataError: if no image has a true pixel, or a mask has a value that is not a class.
    """
    labeler = as_segmenter(teacher if tta is None else tta(as_segmenter(teacher)))
    if len(snapshots) < 2:
        raise ValueError(f"got {len(snapshots)} snapshots; expected two or more")
    networks = [*(as_segmenter(network).eval() for network in snapshots), labeler.eval()]
    where = next(labeler.parameters()).device
    precision = stseg.TrainConfig(steps=1, precision=precision).on(where).precision

    def score(batch: Tensor) -> list[tuple[Tensor, dict[str, float]]]:
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
            *before, logits, views = (network(batch) for network in networks)
        masks = torch.stack([values.argmax(1) for values in before])
        mask, label = logits.argmax(1), views.argmax(1)
        scores = {name: f(masks, mask, num_classes) for name, f in OF_CHECKPOINTS.items()}
        if tta is not None:
            scores |= {name: f(mask[None], label, num_classes) for name, f in OF_VIEWS.items()}
        scores |= {f"{name}, one scale": f(logits) for name, f in OF_LOGITS.items()}
        if tta is not None:
            scores |= {f"{name}, views": f(views) for name, f in OF_LOGITS.items()}
        listed = {name: values.tolist() for name, values in scores.items()}
        return [(one, {name: values[i] for name, values in listed.items()}) for i, one in enumerate(label.cpu())]

    rows: list[tuple[int, Tensor, dict[str, float]]] = []
    with torch.no_grad(), tqdm(total=len(dataset), desc="rankings", disable=not progress, dynamic_ncols=True) as bar:
        for indices, images, masks in batches(dataset, num_classes, ignore_index, batch_size, num_workers):
            for index, true, (label, scores) in zip(indices, masks, score(images.to(where)), strict=True):
                bar.update()
                matrix = functional.confusion_matrix(label, true, num_classes, ignore_index=ignore_index)
                if matrix.sum():
                    rows.append((index, matrix, scores))
    if not rows:
        raise stseg.DataError(f"none of the {len(dataset)} images has a true pixel to measure with")
    rows.sort(key=lambda row: row[0])
    found = {name: [scores[name] for _, _, scores in rows] for name in rows[0][2]}
    return compared(found, torch.stack([matrix for _, matrix, _ in rows]), fraction=fraction)


def batches(
    dataset: Any, num_classes: int, ignore_index: int, batch_size: int, num_workers: int
) -> Iterator[tuple[list[int], Tensor, list[Tensor]]]:
    """Yield indices, stacked images of equal size and their masks: full batches at once, the others at the end."""
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers, generator=torch.Generator())
    waiting: dict[torch.Size, list[tuple[int, Tensor, Tensor]]] = {}
    for index, (id, (image, mask)) in enumerate(zip(dataset.ids, loader, strict=True)):
        unknown = mask[(mask != ignore_index) & ((mask < 0) | (mask >= num_classes))]
        if len(unknown):
            raise stseg.DataError(
                f"mask of {id!r} holds the value {int(unknown[0])}; expected 0..{num_classes - 1} or {ignore_index}"
            )
        group = waiting.setdefault(image.shape, [])
        group.append((index, image, mask))
        if len(group) == batch_size:
            yield _stacked(waiting.pop(image.shape))
    for group in waiting.values():
        yield _stacked(group)


def _stacked(items: Sequence[tuple[int, Tensor, Tensor]]) -> tuple[list[int], Tensor, list[Tensor]]:
    indices, images, masks = zip(*items, strict=True)
    return list(indices), torch.stack(images), list(masks)


def compared(
    scores: Mapping[str, Sequence[float]], matrices: Tensor, *, fraction: float = 0.5
) -> dict[str, dict[str, float]]:
    """Compute the result of ``measure`` from scores and the confusion matrices of pseudo-labels ``(N, K, K)``."""
    true = functional.iou(matrices).nanmean(1).tolist()
    orders = np.random.default_rng(0).random((DRAWS, len(true))).tolist()
    draws = [_compared(order, true, matrices, fraction) for order in orders]
    rows = {name: _compared(values, true, matrices, fraction) for name, values in scores.items()}
    rows["random"] = {key: statistics.fmean(draw[key] for draw in draws) for key in draws[0]}
    rows["oracle"] = _compared(true, true, matrices, fraction)
    return rows


def _compared(scores: Sequence[float], true: Sequence[float], matrices: Tensor, fraction: float) -> dict[str, float]:
    ranking = stseg.Ranking.from_scores(scores, [str(index) for index in range(len(scores))])
    reliable, unreliable = ranking.split(fraction)
    # Constant scores have no correlation.
    correlation = float(spearmanr(scores, true).statistic) if len(set(scores)) > 1 < len(set(true)) else 0.0
    parts = {"reliable": matrices[reliable], "unreliable": matrices[unreliable], "all": matrices}
    return {"spearman": correlation} | {
        name: float(functional.iou(part.sum(0)).nanmean()) for name, part in parts.items()
    }


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Format ``{seed: result of measure}`` as Markdown: correlation of each seed, means and standard deviations."""
    titles = ["ranking", *(f"Spearman, {seed}" for seed in found), "mean", "above the paper's"]
    titles += ["mIoU of the reliable half", "of the rest", "difference"]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    seeds = list(found.values())
    for name in seeds[0]:
        rows = [seed[name] for seed in seeds]
        each = [row["spearman"] for row in rows]
        above = sum(row["spearman"] > seed[PAPER]["spearman"] for row, seed in zip(rows, seeds, strict=True))
        gap = [row["reliable"] - row["unreliable"] for row in rows]
        cells = [
            name,
            *(f"{round(value, 2) + 0.0:.2f}" for value in each),
            _spread(each, 2),
            f"{above} of {len(seeds)}",
        ]
        cells += [_spread([100 * row[key] for row in rows], 1) for key in ("reliable", "unreliable")]
        lines.append(f"| {' | '.join(cells)} | {_spread([100 * value for value in gap], 1)} |")
    everything = _spread([100 * seed["oracle"]["all"] for seed in seeds], 1)
    return "\n".join([*lines, "", f"mIoU of the pseudo-labels of all images: {everything} %."])


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{round(statistics.fmean(values), digits) + 0.0:.{digits}f}"  # not -0.0
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def write_csv(path: Path, figures: Sequence[tuple[str, str, str, Mapping[str, float]]]) -> None:
    """Write every number of every share, seed and ranking."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("fraction", "seed", "ranking", *FIGURES))
        writer.writerows((*names, *(row[key] for key in FIGURES)) for *names, row in figures)


def load_stage(folder: Path, make_network: Callable[[], nn.Module]) -> tuple[nn.Module, list[nn.Module]]:
    """Load the network of a finished stage and its snapshots, in the order of training, on the best device."""

    def read(path: Path) -> nn.Module:
        network = as_segmenter(make_network()).to(device()).eval()
        stseg.load_weights(network, path)
        return network

    snapshots = sorted((folder / "snapshots").glob("*.safetensors"), key=lambda path: int(path.stem))
    return read(folder / "model.safetensors"), [read(path) for path in snapshots]


def teachers(runs: Path) -> dict[str, dict[int, Path]]:
    """Find the finished supervised stages: ``{fraction: {seed: folder}}``."""
    found: dict[str, dict[int, Path]] = {}
    for weights in runs.glob("*/seed_*/supervised/teacher/model.safetensors"):
        seed, fraction = weights.parents[2].name.removeprefix("seed_"), weights.parents[3].name.replace("_", "/")
        found.setdefault(fraction, {})[int(seed)] = weights.parent
    return {fraction: dict(sorted(found[fraction].items())) for fraction in sorted(found, key=share_of)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each teacher, and print a table for each share of labeled images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the data of the runs")
    parser.add_argument("--runs", type=Path, required=True, help="what evidence.py had as --out")
    parser.add_argument("--no-tta", action="store_true", help="the teacher labels at one scale, not with ten views")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--page", type=Path, help="Markdown page to put the tables into, between its ranking marks")
    args = parser.parse_args(arguments)
    settings, folders = read_json(args.runs / "evidence.json"), teachers(args.runs)
    if settings is None or not folders:
        parser.error(f"--runs {args.runs} holds no supervised run of evidence.py that is done")
    if args.page is not None:
        between(args.page, "ranking")
    made_with = argparse.Namespace(**settings)
    if made_with.weights != "installed":  # which come with a normalization of their own
        made_with.weights = None  # they are read from the folders
    source = source_of(args.data, made_with)
    texts, figures = [], []
    for fraction, by_seed in folders.items():
        found = {}
        for seed, folder in by_seed.items():
            teacher, snapshots = load_stage(folder, partial(network_of, made_with))
            found[f"seed {seed}"] = measure(
                teacher,
                snapshots,
                Selected(source.train, source.split(fraction, seed)[1]),
                num_classes=len(source.classes),
                tta=None if args.no_tta else stseg.MultiScaleFlip,
                batch_size=args.batch_size,
                num_workers=args.workers,
                precision="fp32" if made_with.fp32 else "auto",
            )
        texts.append(f"{fraction} labeled\n\n{table(found)}")
        figures += [(fraction, seed, name, row) for seed, rows in found.items() for name, row in rows.items()]
    write_csv(args.runs / "ranking.csv", figures)
    text = "\n\n".join([*texts, f"`benchmarks/ranking.py`, {conditions()}."])
    (args.runs / "ranking.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if args.page is not None:
        put(args.page, "ranking", text)


if __name__ == "__main__":
    main()
