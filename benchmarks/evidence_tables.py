"""Results of ``evidence.py`` as CSV, Markdown tables and plots."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from files import write
from matplotlib.figure import Figure

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """Result of one method with one fraction and one seed."""

    method: str
    fraction: str
    seed: int
    miou: float
    """On the validation set, one confusion matrix, in [0, 1]."""
    iou: list[float]
    """Of each class; NaN where it is neither true nor predicted."""
    labeled: int
    unlabeled: int
    pseudo: dict[str, float]
    """MIoU of the pseudo-labels of each step with the true masks."""
    seconds: float
    """Of all steps, without those of the supervised network it started from."""
    cpu_seconds: float | None
    """Of the process, likewise; None if the run was interrupted."""
    conditions: str


def write_results(
    results: Sequence[Result], classes: Sequence[str], titles: dict[str, str], out: Path, *, plots: bool
) -> None:
    """Write ``results.csv``, ``results.md`` and, with plots, ``methods.png`` and ``classes.png``."""
    write(out / "results.csv", as_csv(results, classes).encode())
    write(out / "results.md", tables(results, classes, titles).encode())
    if not plots:
        return
    methods, gains = Figure(layout="constrained"), Figure(layout="constrained")
    _draw_methods(methods, results, titles)
    _draw_gains(gains, results, classes, titles)
    write(out / "methods.png", as_png(methods))
    write(out / "classes.png", as_png(gains))


def as_png(figure: Figure) -> bytes:
    """Draw a figure as PNG."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()


def as_csv(results: Sequence[Result], classes: Sequence[str]) -> str:
    """Format one line per run; shares are in [0, 1], unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["fraction", "seed", "method", "miou", *(f"iou {name}" for name in classes)]
    writer.writerow([*names, "labeled", "unlabeled", "pseudo-labels", "seconds", "cpu seconds", "conditions"])
    for r in results:
        pseudo = " ".join(f"{step}={value:.4f}" for step, value in r.pseudo.items())
        cpu = "" if r.cpu_seconds is None else round(r.cpu_seconds, 1)
        about = r.labeled, r.unlabeled, pseudo, round(r.seconds, 1), cpu, r.conditions
        writer.writerow([r.fraction, r.seed, r.method, r.miou, *r.iou, *about])
    return text.getvalue()


def read_results(path: Path, classes: Sequence[str]) -> list[Result]:
    """Read what ``as_csv`` wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        return [
            Result(
                method=row["method"],
                fraction=row["fraction"],
                seed=int(row["seed"]),
                miou=float(row["miou"]),
                iou=[float(row[f"iou {name}"]) for name in classes],
                labeled=int(row["labeled"]),
                unlabeled=int(row["unlabeled"]),
                pseudo={step: float(value) for step, value in (e.split("=") for e in row["pseudo-labels"].split())},
                seconds=float(row["seconds"]),
                cpu_seconds=float(row["cpu seconds"]) if row["cpu seconds"] else None,
                conditions=row["conditions"],
            )
            for row in csv.DictReader(file)
        ]


def tables(results: Sequence[Result], classes: Sequence[str], titles: dict[str, str]) -> str:
    """Format, per fraction, the mIoU of each method and seed with mean and deviation, and the IoU of each class."""
    parts = []
    for fraction in _in_order(r.fraction for r in results):
        chosen = [r for r in results if r.fraction == fraction]
        parts += [_miou_table(chosen, titles), _class_table(chosen, classes, titles)]
    return "\n\n".join(parts) + "\n"


def _miou_table(results: Sequence[Result], titles: dict[str, str]) -> str:
    first = results[0]
    seeds = _in_order(sorted(r.seed for r in results))
    base = {r.seed: r.miou for r in results if r.method == "supervised"}
    counts = sorted({r.labeled for r in results})
    count = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
    head = f"mIoU, %, with {first.fraction} of the masks ({count} of {first.labeled + first.unlabeled})"
    lines = [
        f"| {head} | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | gain | pseudo-labels | minutes |"
    ]
    lines.append("|---|" + "---:|" * (len(seeds) + 4))
    for method in _in_order(r.method for r in results):
        found = {r.seed: r for r in results if r.method == method}
        cells = [f"{100 * found[seed].miou:.1f}" if seed in found else "" for seed in seeds]
        gains = [100 * (r.miou - base[seed]) for seed, r in found.items() if seed in base]
        gain = "" if method == "supervised" or not gains else mean_and_deviation(gains, sign=True)
        labels = " / ".join(
            f"{100 * statistics.mean(r.pseudo[step] for r in found.values()):.1f}"
            for step in next(iter(found.values())).pseudo
        )
        mean = mean_and_deviation([100 * r.miou for r in found.values()])
        minutes = statistics.mean(r.seconds for r in found.values()) / 60
        row = [titles[method], *cells, mean, gain, labels, f"{minutes:.0f}"]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _class_table(results: Sequence[Result], classes: Sequence[str], titles: dict[str, str]) -> str:
    lines = ["| IoU, %, mean over seeds | " + " | ".join(classes) + " |", "|---|" + "---:|" * len(classes)]
    for method in _in_order(r.method for r in results):
        found = [r for r in results if r.method == method]
        means = [100 * _mean(r.iou[k] for r in found) for k in range(len(classes))]
        cells = ["" if math.isnan(mean) else f"{mean:.1f}" for mean in means]
        lines.append(f"| {titles[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_and_deviation(values: Sequence[float], *, sign: bool = False) -> str:
    """Format the mean and, for several values, the standard deviation."""
    mean = f"{statistics.mean(values):+.1f}" if sign else f"**{statistics.mean(values):.1f}**"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def _draw_methods(figure: Figure, results: Sequence[Result], titles: dict[str, str]) -> None:
    """Draw every seed as a point and the mean of several as a line."""
    fractions = _in_order(r.fraction for r in results)
    methods = _in_order(r.method for r in results)
    figure.set_size_inches(9, 0.5 + (0.9 + 0.34 * len(methods)) * len(fractions))
    for axes, fraction in zip(figure.subplots(len(fractions), 1, squeeze=False)[:, 0], fractions, strict=True):
        for row, method in enumerate(methods):
            found = [r for r in results if (r.method, r.fraction) == (method, fraction)]
            if not found:
                continue
            if len(found) > 1:
                mean = 100 * statistics.mean(r.miou for r in found)
                axes.plot([mean, mean], [row - 0.3, row + 0.3], color="0.4", linewidth=1)
            for r in found:
                axes.plot(100 * r.miou, row, "o", color=f"C{r.seed % 10}", alpha=0.8)
        axes.set(title=f"{fraction} of the masks", xlabel="mIoU, %", yticks=range(len(methods)))
        axes.set_yticklabels([titles[method].replace("`", "") for method in methods])
        axes.set_ylim(len(methods) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    seeds = sorted({r.seed for r in results})
    for seed in seeds:
        axes.plot([], [], "o", color=f"C{seed % 10}", label=f"seed {seed}")
    figure.legend(loc="outside lower center", ncols=len(seeds), frameon=False)


def _draw_gains(figure: Figure, results: Sequence[Result], classes: Sequence[str], titles: dict[str, str]) -> None:
    """Draw, for each class, the gain over the supervised network, as mean over seeds and for each seed."""
    fractions = _in_order(r.fraction for r in results)
    figure.set_size_inches(9, 3.2 * len(fractions))
    base = {(r.fraction, r.seed): r for r in results if r.method == "supervised"}
    shown = [method for method in ("st", "st++", "st-both", "st++-both") if any(r.method == method for r in results)]
    for axes, fraction in zip(figure.subplots(len(fractions), 1, squeeze=False)[:, 0], fractions, strict=True):
        for place, method in enumerate(shown):
            gains = [
                [100 * (a - b) for a, b in zip(r.iou, base[fraction, r.seed].iou, strict=True)]
                for r in results
                if (r.method, r.fraction) == (method, fraction) and (fraction, r.seed) in base
            ]
            if not gains:
                continue  # not run yet
            width = 0.8 / len(shown)
            at = [k + width * (place - (len(shown) - 1) / 2) for k in range(len(classes))]
            means = [_mean(column) for column in zip(*gains, strict=True)]
            axes.bar(at, means, 0.9 * width, label=titles[method].replace("`", ""))
            for seed in gains:
                axes.plot(at, seed, ".", color="0.2", markersize=4)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set(title=f"{fraction} of the masks", ylabel="gain of IoU, points", xticks=range(len(classes)))
        axes.set_xticklabels(classes, rotation=30, ha="right")
        axes.grid(axis="y", alpha=0.3)
        if axes.containers:
            axes.legend(frameon=False)


def _mean(values: Iterable[float]) -> float:
    """Average the values that are not NaN: a class that is neither true nor predicted has no IoU."""
    some = [value for value in values if not math.isnan(value)]
    return statistics.mean(some) if some else math.nan


def _in_order(values: Iterable[T]) -> list[T]:
    """Return the unique values in order of first occurrence."""
    return list(dict.fromkeys(values))
