"""HTML report of a run, one file: its scores, curves, classes, ranking and pseudo-labels, and what went wrong."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch.utils.data import Dataset

from stseg.checks import check_class_names
from stseg.errors import DataError
from stseg.inference.class_counts import ClassCounts
from stseg.inference.mask_store import MaskStore
from stseg.stages.charts import MISSING, Charts
from stseg.stages.galleries import SCRIPT, Gallery, Picture, draw_galleries, list_colors, overlay, slider
from stseg.stages.page import (
    Html,
    alert,
    definitions,
    details,
    duration,
    element,
    folded,
    join,
    percent,
    section,
    share_bar,
    table,
    write_page,
)
from stseg.stages.predictions import WORST, PredictedImage
from stseg.stages.problems import find_problems, iou_of
from stseg.stages.result import SelfTrainingResult
from stseg.stages.summary import RunSummary, read_run, summarize_result
from stseg.stages.wording import (
    describe_curve,
    describe_method,
    describe_network,
    describe_options,
    describe_training,
    flatten,
    name_method,
    show_settings,
)
from stseg.storage.files import absolute_folder

_PICTURES = 8  # of a gallery
_ENDS = 10  # rows of a ranking at each end
_NO_CURVES = ("epoch", "step", "lr", "seconds", "miou")


def write_report(
    run: SelfTrainingResult | str | Path,
    folder: str | Path | None = None,
    *,
    title: str | None = None,
    class_names: Sequence[str] | None = None,
    images: Dataset[Any] | None = None,
) -> Path:
    """Write ``report.html``: one file, pictures included, that a browser opens without anything else.

    :class:`stseg.SelfTrainer` does this at the end of a run with a ``workdir``. Curves need matplotlib
    (``pip install stseg[report]``); without it the report contains tables and pictures.

    Args:
        run: the result of a run, or the work directory of one of :class:`stseg.SelfTrainer` or :func:`stseg.fit`.
        folder: folder of the report; None for the work directory, if ``run`` is one and the run is finished. The
            record of a run in it, ``run.json``, completes a result.
        title: title of the report; by default the method, if it is known, and the name of the work directory.
        class_names: name of each class; by default those that the run was given.
        images: the unlabeled images of the run, for the pictures of its pseudo-masks, if ``run`` is a work directory. A
            result has them.

    Returns:
        The path of the report.

    Raises:
        DataError: if a folder is no work directory, its run is under way and no other folder is given, or ``images``
            lack one that was labeled.
        DamagedFileError: if a file in it is damaged.
        ValueError: if the names do not fit the classes, or an argument does not go with the others.
        TypeError: if an argument has the wrong type.

    Example:
        >>> import tempfile, torch, stseg
        >>> images = [torch.rand(3, 16, 16) for _ in range(6)]
        >>> pairs = [(image, (image[0] > 0.5).to(torch.uint8)) for image in images[:2]]
        >>> config = stseg.TrainConfig(steps=3, batch_size=2, weak=stseg.WeakAugment(16))
        >>> trainer = stseg.SelfTrainer(
        ...     lambda: torch.nn.Conv2d(3, 2, 1), num_classes=2, config=config, progress=False
        ... )
        >>> write_report(trainer.fit(pairs, images[2:]), tempfile.mkdtemp(), title="Two classes").name
        'report.html'
    """
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title is {title!r}; expected a text")
    if isinstance(run, SelfTrainingResult):
        if folder is None:
            raise ValueError("folder is None; expected the folder of the report: write_report(result, 'runs/first')")
        if images is not None:
            raise ValueError(
                "images go with a work directory; a result has its own: expected write_report(result, folder)"
            )
        summary = summarize_result(run, _absolute(folder))
    elif isinstance(run, (str, Path)):
        summary = read_run(run, images)
        if folder is None and not summary.is_finished:
            raise DataError(
                f"the run in {summary.folder} is not finished; expected another folder for its report so far, as in "
                f"stseg.write_report({str(run)!r}, 'so-far')"
            )
    else:
        raise TypeError(
            f"run is {type(run).__name__}; expected the result of SelfTrainer.fit, or the folder of a run, such as "
            "'runs/first'"
        )
    check_class_names(class_names, summary.num_classes)
    if class_names is not None:
        summary = replace(summary, class_names=tuple(class_names))
    target = summary.folder if folder is None else _absolute(folder)
    counted = {name: counts for name in summary.labelings if (counts := summary.count_classes(name)) is not None}
    return write_page(
        target / "report.html",
        title or ": ".join(filter(None, (name_method(summary), summary.folder.name))),
        _kind(summary),
        _headline(summary),
        alert("What is wrong", find_problems(summary, counted)),
        _predictions(summary),
        section("What was run", _what_was_run(summary)),
        section("Steps", _steps(summary)),
        section("Training", _curves(summary, charts := Charts())),
        section("IoU by class", _iou_by_stage(summary)),
        section("Classes", _classes(summary, counted)),
        section("Ranking", _ranking(summary, charts, target)),
        section("Pseudo-labels", _pictures(summary)),
        section("Images that were left out", _skipped(summary)),
        section("All settings", *_settings(summary)),
        script=SCRIPT,
    )


def _absolute(folder: str | Path) -> Path:
    path = absolute_folder(folder)
    assert path is not None
    return path


def _kind(run: RunSummary) -> str:
    """Return what the page is, and when the run ended."""
    if run.finished is not None:
        return f"Training report: finished on {_date(datetime.fromisoformat(run.finished).astimezone())}"
    return f"Training report{'' if run.is_finished else ' of a run under way'}, written on {_date(datetime.now())}"


def _date(time: datetime) -> str:
    return f"{time.day} {time:%B %Y, %H:%M}"


def _headline(run: RunSummary) -> Html:
    """Return the final mIoU, the IoU of each class, and the numbers of images."""
    name, training = ([*run.trainings] or [""])[-1], run.last
    row = None if training is None else training.row(run.keep)
    images = run.count("validation")
    if row is None or "miou" not in row:
        score = join((element("div", "–", kind="score"), element("p", "No mIoU: the run has no validation images.")))
        if training is not None and row is None:
            score = join((element("div", "–", kind="score"), element("p", f"No mIoU yet: {name} has just begun.")))
    else:
        of = f"{images} validation images" if images else "the validation images"
        chosen = ", which chose the weights" if run.keep == "best" else ""
        stage = f", of {name}" if len(run.trainings) > 1 else ""
        what = f"mean IoU on {of}{stage}{chosen}"
        score = join((element("div", percent(row["miou"]), kind="score"), element("p", what)))
    iou = iou_of(row)
    rows = [
        (run.class_name(index), share_bar(percent(value), 0 if math.isnan(value) else value))
        for index, value in enumerate(iou)
    ]
    scores = table("IoU of each class", ("Class", "IoU"), rows, numbers=(1,))
    facts = definitions(
        (
            ("Labeled", _images(run, "labeled")),
            ("Unlabeled", _images(run, "unlabeled")),
            ("Validation", _images(run, "validation")),
            ("Method", name_method(run)),
            ("Network", describe_network(training.network) if training is not None else ""),
            ("Duration", duration(sum(run.seconds.values())) + ("" if run.is_finished else " so far")),
        )
    )
    parts = [
        element("div", score, facts),
        element("div", folded(f"IoU of {len(rows)} classes", rows, scores)) if rows else "",
    ]
    return element("div", *parts, kind="headline")


def _images(run: RunSummary, name: str) -> str:
    count = run.count(name)
    left_out = f", {len(run.skipped)} of them left out" if name == "unlabeled" and run.skipped else ""
    return "" if count is None else f"{count:,} images{left_out}"


def _predictions(run: RunSummary) -> Html:
    """Show what the final network predicts for validation images beside their true masks, or for unlabeled ones."""
    found = run.predictions
    if found is None or not found.images:
        missing = "There are no pictures of predictions: a run of stseg.SelfTrainer with val=... makes them at its end."
        return section("Predictions", element("p", missing))
    known = found.images[0].iou is not None
    chosen = found.compared > len(found.images) > WORST
    of = f"{found.compared:,} images" + (
        "" if found.compared == found.total else f" (evenly spaced among {found.total:,})"
    )
    which = f"the worst and the best of {of}" if chosen else f"{of}, the worst one first" if known else of
    by = ", by the mean IoU over the classes in each" if known else ""
    note = f"What the final network predicts for {which}{by}."
    what = "validation" if known else "unlabeled"
    groups = (
        (("The worst", found.images[:WORST]), ("The best", found.images[: WORST - 1 : -1]))
        if known and chosen
        else (("", found.images),)
    )
    parts = [
        join(
            (
                element("h3", title) if title else "",
                element("div", *(_predicted(one, what) for one in images), kind="pictures predictions"),
            )
        )
        for title, images in groups
    ]
    values = {value for one in found.images for value in one.values}
    colors = list_colors(values, run.ignore_index, run.class_name, "no color: ignored in the true mask")
    return section(
        f"Predictions on {what} images", element("p", note), slider("opacity-of-predictions"), colors, *parts
    )


def _predicted(one: PredictedImage, what: str) -> Html:
    """Return an image, its true mask if there is one, and its prediction, side by side."""
    panels = [("image", "", f"{what} image {one.id}", "")]
    panels += [("true mask", one.truth, "", f"true mask of {one.id}")] * bool(one.truth)
    panels += [("prediction", one.prediction, "", f"prediction for {one.id}")]
    drawn = (
        element("div", overlay(one.image, mask, one.size, (alt, of)), element("small", name))
        for name, mask, alt, of in panels
    )
    score = "" if one.iou is None else element("div", f"mean IoU {percent(one.iou)}")
    caption = element("figcaption", element("b", one.id), score)
    return element("figure", element("div", *drawn, kind="panels"), caption)


def _what_was_run(run: RunSummary) -> Html:
    known = definitions(
        (
            ("Method", describe_method(run)),
            ("Its options", describe_options(run)),
            ("Training", describe_training(run)),
            (
                "Versions",
                ", ".join(f"{name} {of}" for name, of in run.versions.items() if name in ("stseg", "torch", "python")),
            ),
        )
    )
    return known if run.settings else Html("")


def _steps(run: RunSummary) -> Html:
    """Tell what each step did, its duration and its final loss and mIoU."""
    rows = []
    for step, seconds in run.seconds.items():
        what, loss, miou = "", "", ""
        if step in run.trainings:
            row = run.trainings[step].row(run.keep)
            if row is not None:
                best = ", the best one" if run.keep == "best" and row is not run.trainings[step].history[-1] else ""
                what, loss = f"trained to step {row['step']:.0f}{best}", f"{row.get('loss', math.nan):.3f}"
                miou = percent(row["miou"]) if "miou" in row else ""
        elif step in run.labelings:
            labeling = run.labelings[step]
            what = f"labeled {len(labeling.ids):,} images" + (f" by {labeling.by}" if labeling.by else "")
        elif run.ranking is not None:
            what = f"ranked {len(run.ranking):,} images"
        rows.append((step, what, duration(seconds), loss, miou))
    return table("Steps of the run, in order", ("Step", "", "Duration", "Loss", "mIoU"), rows, numbers=(2, 3, 4))


def _curves(run: RunSummary, charts: Charts) -> Html:
    """Draw all that was logged, and the mIoU, over the steps of each training."""
    rows = [row for training in run.trainings.values() for row in training.history]
    names = dict.fromkeys(
        name for row in rows for name in row if name not in _NO_CURVES and not name.startswith("iou/")
    )
    if not rows:
        return Html("")
    if not charts.are_drawn:
        return MISSING
    drawn = [_curve(run, charts, "mIoU on the validation images", "miou")]
    drawn += [_curve(run, charts, describe_curve(name), name) for name in names]
    return element("div", *drawn, kind="charts")


def _curve(run: RunSummary, charts: Charts, title: str, name: str) -> Html:
    factor = 100 if name == "miou" else 1
    lines = {}
    for step, training in run.trainings.items():
        known = [row for row in training.history if name in row]
        if known:
            lines[step] = ([row["step"] for row in known], [factor * row[name] for row in known])
    return charts.lines(title, lines, x="step", y="mIoU, %" if name == "miou" else name)


def _iou_by_stage(run: RunSummary) -> Html:
    """Return the IoU of each class at the end of each training."""
    found = {name: iou for name, training in run.trainings.items() if (iou := iou_of(training.row(run.keep)))}
    classes = max(map(len, found.values()), default=0)
    rows = [
        (run.class_name(index), *(percent(iou[index] if index < len(iou) else None) for iou in found.values()))
        for index in range(classes)
    ]
    rows += (
        [("mean", *(percent((run.trainings[name].row(run.keep) or {}).get("miou")) for name in found))] if rows else []
    )
    several = len(found) > 1
    caption = f"IoU of each class on the validation images{', after each training' if several else ''}"
    head = ("Class", *(found if several else ["IoU"]))
    return folded(caption, rows, table(caption, head, rows, numbers=range(1, len(found) + 1)))


def _classes(run: RunSummary, counted: Mapping[str, ClassCounts]) -> Html:
    """Compare the shares of the classes in the labeled data and in the pseudo-masks."""
    columns: dict[str, tuple[Sequence[int], int]] = {}
    for name in ("labeled", "validation"):
        if (counts := run.classes(name)) is not None:
            columns[name] = (counts["pixels"], counts["ignored"])
    for name, pseudo in counted.items():
        columns[f"pseudo-masks: {name}"] = (pseudo.pixels.tolist(), pseudo.ignored)
    totals = [max(1, sum(pixels) + ignored) for pixels, ignored in columns.values()]
    classes = max((len(pixels) for pixels, _ in columns.values()), default=0)
    shares = [
        (
            run.class_name(index),
            [pixels[index] / total for (pixels, _), total in zip(columns.values(), totals, strict=True)],
        )
        for index in range(classes)
    ]
    shares += [
        ("ignored", [ignored / total for (_, ignored), total in zip(columns.values(), totals, strict=True)])
    ] * bool(columns)
    rows = [(name, *(share_bar(percent(share, 2), share) for share in each)) for name, each in shares]
    caption = "Share of the pixels of each class"
    whole = table(caption, ("Class", *columns), rows, numbers=range(1, len(columns) + 1))
    note = [element("p", _how_counted(run, counted))] if counted else []
    return join((*note, folded(caption, rows, whole))) if columns else Html("")


def _how_counted(run: RunSummary, counted: Mapping[str, ClassCounts]) -> str:
    of = {name: (counts.total, len(run.labelings[name].ids)) for name, counts in counted.items()}
    parts = (
        f"{'all' if total == count else f'{total:,} of the'} {count:,} masks of {name}"
        for name, (total, count) in of.items()
    )
    spaced = ", evenly spaced" if any(total < count for total, count in of.values()) else ""
    return f"Pixels of pseudo-masks were counted in {', '.join(parts)}{spaced}."


def _ranking(run: RunSummary, charts: Charts, target: Path) -> Html:
    """Draw the scores with the cut between reliable and unreliable images, and show the ends of the ranking."""
    ranking = run.ranking
    if ranking is None or not len(ranking):
        return Html("")
    what, cut = _score_name(run), None
    if run.reliable is not None and 0 < run.reliable < len(ranking):
        cut = (ranking.scores[run.reliable - 1] + ranking.scores[run.reliable]) / 2
    drawn = charts.histogram(
        "Scores of the unlabeled images", ranking.scores, x=what, y="images", cut=cut, parts=("reliable", "unreliable")
    )
    places = range(len(ranking))
    ends = [*places] if len(ranking) <= 2 * _ENDS else [*places[:_ENDS], None, *places[-_ENDS:]]
    rows = [
        ("…",) * 4 if place is None else (
            f"{place + 1:,}", ranking.ids[place], f"{ranking.scores[place]:.4f}", _part(run, place),
        )
        for place in ends
    ]  # fmt: skip
    head = ("Place", "Image", what[0].upper() + what[1:], "Part")
    split = "" if cut is None else f" The first {run.reliable:,} are reliable: down to a score of {cut:.4f}."
    note = element("p", f"{len(ranking):,} images, best first.{split} ", *_link(run, target))
    return join(
        (
            note,
            element("div", drawn, kind="charts") if drawn else "",
            table("Both ends of the ranking", head, rows, numbers=(0, 2)),
        )
    )


def _part(run: RunSummary, place: int) -> str:
    return "" if run.reliable is None else "reliable" if place < run.reliable else "unreliable"


def _link(run: RunSummary, target: Path) -> Iterator[object]:
    """Yield a sentence with a link to the file of the ranking, if there is one."""
    if run.ranking_file is not None:
        try:
            address = quote(Path(os.path.relpath(run.ranking_file, target)).as_posix())
        except ValueError:  # on another drive
            address = run.ranking_file.as_uri()
        yield "The whole ranking is in the work directory: "
        yield element("a", f"{run.ranking_file.parent.name}/{run.ranking_file.name}", href=address)
        yield "."


def _score_name(run: RunSummary) -> str:
    """Return what images are ranked by, as far as the settings tell."""
    method = run.settings.get("method", {})
    if "ranker" not in method:
        return "score"
    ranker = method["ranker"]
    kind = ranker.get("type") if isinstance(ranker, Mapping) else ranker
    return {None: "stability", "StabilityRanker": "stability", "ConfidenceRanker": "mean confidence"}.get(kind, "score")


def _pictures(run: RunSummary) -> Html:
    """Show the most and the least stable images with their pseudo-masks, and some of all."""
    places = {
        id: (name, position)
        for name, labeling in run.labelings.items()
        if labeling.data is not None
        for position, id in enumerate(labeling.ids)
    }
    if not places:
        missing = "The images are not in the work directory: stseg.write_report(workdir, images=unlabeled) shows them."
        return element("p", missing) if any(labeling.ids for labeling in run.labelings.values()) else Html("")
    what = _score_name(run)
    ranked = [] if run.ranking is None else [id for id in run.ranking.ids if id in places]
    best, worst = ranked[:_PICTURES], ranked[_PICTURES:][-_PICTURES:]
    rest = sorted(places.keys() - {*best, *worst})
    sample = sorted(random.Random(0).sample(rest, min(_PICTURES, len(rest))))
    scores = (
        {}
        if run.ranking is None
        else {
            id: (place, score)
            for place, (id, score) in enumerate(zip(run.ranking.ids, run.ranking.scores, strict=True))
        }
    )

    def pictures(ids: Sequence[str]) -> list[Picture]:
        found = []
        for id in ids:
            name, position = places[id]
            labeling = run.labelings[name]
            assert labeling.data is not None
            score = (
                f"{what} {scores[id][1]:.3f}, place {scores[id][0] + 1:,} of {len(scores):,}"
                if id in scores
                else _confidence(labeling.store, id)
            )
            found.append(Picture(labeling.data, position, labeling.by, score))
        return found

    stable = "stable" if what == "stability" else "confident" if what == "mean confidence" else "reliable"
    to_ranking = element("p", "Their scores are in the ", element("a", "ranking", href="#ranking"), ".")
    return draw_galleries(
        (
            Gallery(f"The most {stable}", "", pictures(best)),
            Gallery(f"The least {stable}", to_ranking, pictures(worst)),
            Gallery("A random sample" + (" of the others" if best else ""), "", pictures(sample)),
        ),
        ignore_index=run.ignore_index,
        class_name=run.class_name,
    )


def _confidence(store: MaskStore, id: str) -> str:
    try:
        return f"mean confidence {float(store.confidence(id).mean()):.3f}"
    except KeyError:
        return ""


def _skipped(run: RunSummary) -> Html:
    rows = [(skipped.id, skipped.reason) for skipped in run.skipped]
    caption = f"{len(rows):,} images that could not be read"
    return folded(caption, rows, table(caption, ("Image", "Reason"), rows))


def _settings(run: RunSummary) -> Iterator[Html]:
    data = {name: value for name, value in run.data.items() if "classes" not in name}
    for title, values in (("Settings", show_settings(run)), ("Data", data), ("Versions", run.versions)):
        yield details(title, table(title, ("Name", "Value"), flatten(values).items()))
