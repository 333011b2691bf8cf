"""HTML report of a run: training curves, the ends of the ranking, pseudo-masks, settings."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from stseg.inference.labeler import PseudoLabeled
from stseg.inference.mask_files import palette
from stseg.stages.result import SelfTrainingResult
from stseg.storage.files import write_atomically
from stseg.storage.records import read_record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 6  # images at each end of the ranking
_STYLE = """body { font: 16px/1.5 sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } img { max-width: 100% }
td, th { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td.number, th.number { text-align: right } .class { display: inline-block; margin-right: 1.2rem }
.class i { display: inline-block; width: 1em; height: 1em; margin-right: .3em; vertical-align: -.1em }"""


def write_report(result: SelfTrainingResult, folder: str | Path, *, class_names: Sequence[str] | None = None) -> Path:
    """Write ``report.html`` and its figures, ``figures/*.png``.

    :class:`stseg.SelfTrainer` does this at the end of a run with a ``workdir``. Figures need matplotlib
    (``pip install stseg[report]``); without it the report contains only tables.

    Args:
        result: result of a run.
        folder: folder of the report. The settings in its ``run.json`` are shown if there is one.
        class_names: name of each class, for the legend of mask colors.

    Returns:
        The path of the report.

    Example:
        >>> import tempfile, torch, stseg
        >>> images = [torch.rand(3, 16, 16) for _ in range(6)]
        >>> pairs = [(image, (image[0] > 0.5).to(torch.uint8)) for image in images[:2]]
        >>> config = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16))
        >>> trainer = stseg.SelfTrainer(
        ...     lambda: torch.nn.Conv2d(3, 2, 1), num_classes=2, config=config, progress=False
        ... )
        >>> write_report(trainer.fit(pairs, images[2:]), tempfile.mkdtemp()).name
        'report.html'
    """
    folder = Path(folder)
    figures = _figures(result, folder / "figures")
    run = read_record(folder / "run.json") or {}
    body = "".join(
        (
            "<h1>Self-training report</h1>",
            _steps(result),
            _pictures(figures, class_names),
            _skipped(result),
            _classes(run.get("data", {})),
            _settings("Settings", run.get("settings", {})),
            _settings("Data", {key: value for key, value in run.get("data", {}).items() if "classes" not in key}),
            _settings("Versions", run.get("versions", {})),
        )
    )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Self-training report</title>'
        f"<style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )
    path = folder / "report.html"
    write_atomically(path, lambda file: file.write(page.encode()))
    return path


def _steps(result: SelfTrainingResult) -> str:
    """Format what each step did, its duration and its final loss and mIoU."""
    rows = []
    for step, seconds in result.seconds.items():
        what, loss, miou = "", "", ""
        if step in result.stages and result.stages[step].history:
            last = result.stages[step].history[-1]
            what, loss = f"trained for {last['step']:.0f} steps", f"{last['loss']:.3f}"
            miou = f"{100 * last['miou']:.1f}" if "miou" in last else ""
        elif step in result.labels:
            what = f"labeled {len(result.labels[step])} images"
        elif result.ranking is not None:
            what = f"ranked {len(result.ranking)} images"
        rows.append((step, what, f"{seconds:.1f}", loss, miou))
    return _table(("Step", "", "Seconds", "Last loss", "mIoU on validation, %"), rows, numbers=(2, 3, 4))


def _pictures(figures: dict[str, str] | None, class_names: Sequence[str] | None) -> str:
    if figures is None:
        return "<p>There are no pictures: they need matplotlib (<code>pip install stseg[report]</code>).</p>"
    parts = [f'<h2>{title}</h2><p><img src="figures/{name}" alt="{title}"></p>' for name, title in figures.items()]
    if class_names is not None:
        for color, name in zip(np.array(palette()).reshape(-1, 3).tolist(), class_names, strict=False):
            square = f'<i style="background: rgb{tuple(color)}"></i>'
            parts.append(f'<span class="class">{square}{html.escape(name)}</span>')
    return "".join(parts)


def _skipped(result: SelfTrainingResult) -> str:
    if not result.skipped:
        return ""
    rows = [(skipped.id, skipped.reason) for skipped in result.skipped]
    return f"<h2>Left out: {len(rows)} images that could not be read</h2>" + _table(("Image", "Reason"), rows)


def _classes(data: dict[str, Any]) -> str:
    """Format the share of pixels, and the number of masks, of each class of the labeled data."""
    tables = ""
    for name in ("labeled", "validation"):
        counts = data.get(f"{name} classes")
        if not isinstance(counts, dict):
            continue
        everything = max(1, sum(counts["pixels"]) + counts["ignored"])
        rows = [
            (str(index), f"{pixels / everything:.2%}".replace("%", " %"), str(masks))
            for index, (pixels, masks) in enumerate(zip(counts["pixels"], counts["masks"], strict=True))
        ]
        rows.append(("ignored", f"{counts['ignored'] / everything:.2%}".replace("%", " %"), ""))
        tables += _table((f"Class ({name})", "Pixels", "Masks"), rows, numbers=(1, 2))
    return f"<h2>Classes</h2>{tables}" if tables else ""


def _settings(title: str, values: dict[str, Any]) -> str:
    flat = [
        (f"{key}.{inner}" if inner else key, str(value))
        for key, outer in values.items()
        for inner, value in (outer.items() if isinstance(outer, dict) else [("", outer)])
    ]
    return f"<h2>{title}</h2>{_table(('', ''), flat)}" if flat else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = (' class="number"' if place in numbers else "" for place in range(len(cells)))
        return "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True))

    lines = [row("th", head), *(row("td", cells) for cells in rows)]
    return "<table>" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _figures(result: SelfTrainingResult, folder: Path) -> dict[str, str] | None:
    """Draw all figures, and return titles by file name; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    drawings: dict[str, tuple[str, Callable[[Figure], None]]] = {
        "training.png": ("Training", lambda figure: _draw_training(figure, result))
    }
    ranking = result.ranking
    if ranking is not None and len(ranking):
        images = _pseudo_labeled(result)
        drawings["scores.png"] = ("Stability scores", lambda figure: _draw_scores(figure, ranking.scores))
        best, worst = ranking.ids[:_SHOWN], ranking.ids[-_SHOWN:]
        drawings["most_stable.png"] = ("Most stable images", lambda figure: _draw_masks(figure, images, best))
        drawings["least_stable.png"] = ("Least stable images", lambda figure: _draw_masks(figure, images, worst))
    elif result.labels:
        images = _pseudo_labeled(result)
        best = tuple(images)[:_SHOWN]
        drawings["labels.png"] = ("Pseudo-labeled images", lambda figure: _draw_masks(figure, images, best))
    for name, (_, draw) in drawings.items():
        figure = Figure(layout="constrained")
        draw(figure)
        write_atomically(folder / name, partial(figure.savefig, format="png", dpi=100))
    return {name: title for name, (title, _) in drawings.items()}


def _pseudo_labeled(result: SelfTrainingResult) -> dict[str, tuple[PseudoLabeled, int]]:
    return {id: (data, index) for data in result.labels.values() for index, id in enumerate(data.ids)}


def _draw_training(figure: Figure, result: SelfTrainingResult) -> None:
    """Draw the logged losses and the validation mIoU over the steps, a line for each training."""
    rows = [row for stage in result.stages.values() for row in stage.history]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("epoch", "step", "lr", "seconds"))
    names = {name: None for name in names if not name.startswith("iou/")}  # too many to draw
    columns = min(2, len(names))
    figure.set_size_inches(5 * columns, 3.5 * -(-len(names) // columns))
    for axes, name in zip(figure.subplots(-(-len(names) // columns), columns, squeeze=False).flat, names, strict=False):
        factor = 100 if name == "miou" else 1
        for step, stage in result.stages.items():
            known = [row for row in stage.history if name in row]
            if known:
                axes.plot([row["step"] for row in known], [factor * row[name] for row in known], ".-", label=step)
        axes.set(xlabel="step", ylabel="mIoU on validation, %" if name == "miou" else name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)


def _draw_scores(figure: Figure, scores: Sequence[float]) -> None:
    figure.set_size_inches(6, 3)
    axes = figure.subplots()
    axes.hist(scores, bins=40, range=(0, 1))
    axes.set(xlabel="stability (mean IoU of earlier checkpoints with the last)", ylabel="images", xlim=(0, 1))


def _draw_masks(figure: Figure, images: dict[str, tuple[PseudoLabeled, int]], ids: Sequence[str]) -> None:
    """Draw the images, each above its pseudo-mask."""
    figure.set_size_inches(2 * len(ids), 4.3)
    colors = np.array(palette(), dtype=np.uint8).reshape(-1, 3)
    for column, id in zip(figure.subplots(2, len(ids), squeeze=False).T, ids, strict=True):
        data, index = images[id]
        image, mask = data[index]
        column[0].imshow(_shown(image), cmap="gray")
        column[0].set_title(id if len(id) < 20 else f"…{id[-18:]}", fontsize=8)
        column[1].imshow(colors[mask.int().numpy() % 256])
        for axes in column:
            axes.set_axis_off()


def _shown(image: Tensor) -> Any:
    """Return three channels as colors, any other number as the first one in gray."""
    return image[:3].permute(1, 2, 0).numpy() if len(image) >= 3 else image[0].numpy()
