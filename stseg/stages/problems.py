"""What went wrong in a run, as far as its numbers tell."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from stseg.inference.class_counts import ClassCounts
from stseg.stages.page import percent
from stseg.stages.summary import RunSummary

_FALL = 0.01  # of the mIoU from the first training to the last


def find_problems(run: RunSummary, counted: Mapping[str, ClassCounts]) -> list[str]:
    """Name what is wrong with a run: its own warnings, networks that predict one class alone, classes that vanished.

    Args:
        run: the run.
        counted: pixels of each class in its pseudo-masks, by labeling.
    """
    warnings = [*run.warnings, *(text for training in run.trainings.values() for text in training.warnings)]
    return list(dict.fromkeys([*warnings, *_of_validation(run), *_of_pseudo_masks(run, counted)]))


def iou_of(row: Mapping[str, float] | None) -> list[float]:
    """Return the IoU of each class in a row of a history; empty if it holds none."""
    values = {} if row is None else {int(name[4:]): value for name, value in row.items() if name.startswith("iou/")}
    return [values.get(index, math.nan) for index in range(max(values, default=-1) + 1)]


def _of_validation(run: RunSummary) -> Iterator[str]:
    scores = {}
    for name, training in run.trainings.items():
        row = training.row(run.keep)
        if row is None or "miou" not in row:
            continue
        scores[name] = row["miou"]
        if math.isnan(row["miou"]):
            yield f"The mIoU of {name} is not a number: logits on the validation images were not finite."
        yield from _of_single_class(run, name, iou_of(row), row["miou"])
    if scores:
        (first, before), *_, (last, after) = scores.items() if len(scores) > 1 else [*scores.items()] * 2
        if after < before - _FALL:
            yield (
                f"{last} is worse than {first} on the validation images: mIoU {percent(after)} after {percent(before)}."
            )


def _of_single_class(run: RunSummary, name: str, iou: Sequence[float], miou: float) -> Iterator[str]:
    """Tell of a network that predicts, or finds, one class alone, as its IoU (empty if not known) and mIoU say."""
    counts = run.classes("validation")
    present = {} if counts is None else {index: pixels for index, pixels in enumerate(counts["pixels"]) if pixels}
    if len(present) < 2:
        return
    # The IoU of the only class that is predicted is its share of the pixels, that of all others 0.
    shares = {index: pixels / sum(present.values()) for index, pixels in present.items()}
    found = [index for index, value in enumerate(iou) if value > 0]
    if len(found) == 1 and not math.isclose(iou[found[0]], shares.get(found[0], 0), rel_tol=1e-9):
        yield f"{name} finds {_named(run, found)} alone on the validation images: the IoU of every other class is 0."
        return
    alone = [index for index, share in shares.items() if math.isclose(miou, share / len(present), rel_tol=1e-9)]
    if only := (alone if not iou else found if len(found) == 1 else []):
        classes = " or ".join(_named(run, [index]) for index in only)  # several have the same share
        yield f"{name} predicts {classes} alone on the validation images."


def _of_pseudo_masks(run: RunSummary, counted: Mapping[str, ClassCounts]) -> Iterator[str]:
    labeled = run.classes("labeled")
    for name, counts in counted.items():
        by = run.labelings[name].by
        masks = f"the {counts.total} pseudo-masks of {name!r} that were counted" + (f" (labeled by {by})" if by else "")
        found = counts.pixels.nonzero().flatten().tolist()
        if not found:
            yield f"All pixels of {masks} are left out: no prediction reaches the confidence threshold."
        elif len(found) == 1:
            yield f"{_named(run, found)[0].upper()}{_named(run, found)[1:]} is the only class in {masks}."
        elif labeled is not None:
            missing = [index for index, pixels in enumerate(labeled["pixels"]) if pixels and index not in found]
            if missing:
                shares = ", ".join(percent(labeled["pixels"][index] / sum(labeled["pixels"]), 2) for index in missing)
                yield (
                    f"No pixel of {masks} has {_named(run, missing)}, which {'has' if len(missing) == 1 else 'have'} "
                    f"{shares} of the labeled pixels."
                )


def _named(run: RunSummary, classes: Sequence[int]) -> str:
    """Name classes by number, and by name where that is known."""
    names = [f"{index}" if run.class_names is None else f"{index} ({run.class_names[index]})" for index in classes]
    return f"class{'es' if len(names) > 1 else ''} {', '.join(names)}"
